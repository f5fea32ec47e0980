"""Qwen3-VL: vision features enter several layers of the text model (DeepStack, arXiv 2406.04334)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """Dense Qwen3-VL. An image token's features are [D x (1 + levels)]: its embedding, then what is added to it after each of
    the first layers. vLLM takes precomputed images in the same form."""

    def hf_name(self, name: str) -> str:
        """Its checkpoints were published with transformers' own names."""
        return name

    def _features(self, output: Any) -> Tensor:
        """[tokens, D x (1 + levels)]."""
        return torch.cat([output.pooler_output, *output.deepstack_features], dim=1)

    def _placed(self, embedded: Tensor, places: Tensor, images: Tensor) -> dict[str, Any]:
        """transformers adds the features of each level to the hidden states of the marked tokens."""
        merged, *levels = images.split(embedded.shape[1], dim=1)
        marked = torch.zeros(1, len(embedded), dtype=torch.bool, device=embedded.device).index_fill(1, places, True)
        return {
            **super()._placed(embedded, places, merged), "visual_pos_masks": marked, "deepstack_visual_embeds": levels,
        }  # fmt: skip
