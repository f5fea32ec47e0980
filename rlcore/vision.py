"""Each image once: what a frozen vision tower makes of it is kept for a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Vision = Mapping[str, Tensor]  # what the processor made of one prompt's images


class ImageCache:
    """Embeddings by prompt, for models that share one frozen tower. `encoded` counts prompts' images that the tower read."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Vision, list[Tensor]]] = {}  # the key's owner is held, so that its id stays its own
        self.encoded = 0

    def embed(self, prompts: Sequence[Vision], encode: Callable[[Sequence[Vision]], list[list[Tensor]]]) -> list[Tensor]:
        """The embeddings [tokens, D] of every image in order; `encode` gives those of prompts that are not kept, by prompt."""
        fresh = list({id(vision): vision for vision in prompts if id(vision) not in self._kept}.values())
        if fresh:
            with torch.no_grad():
                for vision, images in zip(fresh, encode(fresh), strict=True):
                    self._kept[id(vision)] = (vision, images)
                    self.encoded += len(images)
        return [image for vision in prompts for image in self._kept[id(vision)][1]]

    def clear(self) -> int:
        """Forget, and say how many images were encoded since the last time."""
        self._kept.clear()
        encoded, self.encoded = self.encoded, 0
        return encoded
