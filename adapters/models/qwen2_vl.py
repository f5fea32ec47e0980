"""Qwen2-VL and Qwen2.5-VL: images become runs of placeholder tokens with positions on three axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from rlcore.data.images import sizes
from rlcore.distributed.ulysses import Slice
from rlcore.errors import ConfigError, RunError
from rlcore.model.attention import NAME as PACKED_ATTENTION
from rlcore.model.precision import lookup
from rlcore.types import Packed, Prompt, Row, Vision

from .causal_lm import CausalLM, image_parts


class Qwen2VL(CausalLM):
    """Qwen2-VL and Qwen2.5-VL, whose vision towers differ; for rows with and without images."""

    model_class: ClassVar[Any] = AutoModelForImageTextToText
    processor_class: ClassVar[Any] = AutoProcessor
    attention: ClassVar[str | Mapping[str, str]] = {"": "sdpa", "text_config": PACKED_ATTENTION, "vision_config": "sdpa"}

    def __init__(self, folder: Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        """Images are scaled to between `min_pixels` and `max_pixels`; None is the folder's own limit. ConfigError for limits
        that no image can keep."""
        super().__init__(folder)
        images = self.processor.image_processor
        size = _limits(folder, images, min_pixels, max_pixels)
        if min_pixels is not None or max_pixels is not None:
            images.size, self.image_options = type(images.size)(**size), {"size": size}

    def _sequences(self, row: Row) -> Iterator[tuple[str, list[int], list[bool]]]:
        placeholders = 0
        for text, token_ids, written in super()._sequences(row):
            placeholders = token_ids.count(self.processor.image_token_id)
            yield text, token_ids, written
        self._check_placeholders(row, placeholders)

    def _prompt(self, row: Row, text: str, token_ids: list[int]) -> Prompt:
        """`vision` holds pixel_values [patches, C] float32 and image_grid_thw [I, 3] in patches before merging, of the images
        that `token_ids` have placeholders for.

        ConfigError names a row whose image parts and images do not match, or an image too long and thin.
        """
        row = replace(row, images=row.images[: token_ids.count(self.processor.image_token_id)])
        if not row.images:
            return super()._prompt(row, text, token_ids)
        processor = self.processor.image_processor
        counts = self._image_tokens(row)
        vision = processor(images=list(row.images), return_tensors="pt")
        grids = vision["image_grid_thw"].clone()
        grids[:, 1:] //= processor.merge_size
        if grids.prod(-1).tolist() != counts:
            raise RunError(
                f"{row.id}: the image processor made {grids.prod(-1).tolist()} tokens of the images, their sizes say {counts};"
                " its get_number_of_image_patches is wrong"
            )
        expanded = np.repeat(token_ids, self._widths(row, token_ids)).tolist()
        return Prompt(
            row, expanded, token_ids,
            vision={"pixel_values": vision["pixel_values"], "image_grid_thw": vision["image_grid_thw"]},
            position_ids=multimodal_positions(expanded, self.processor.image_token_id, grids.tolist()),
            text=text,
        )

    def _widths(self, row: Row, token_ids: Sequence[int]) -> NDArray[np.int64]:
        widths = super()._widths(row, token_ids)
        places = np.flatnonzero(np.equal(token_ids, self.processor.image_token_id))
        widths[places] = self._image_tokens(replace(row, images=row.images[: len(places)]))
        return widths

    def vision_tower(self, model: Any) -> nn.Module:
        return model.model.visual

    def embed_images(self, tower: Any, vision: Vision) -> Sequence[Tensor]:
        """`_features` of each image, one token a merged patch."""
        pixels, grids = vision["pixel_values"].to(tower.device, tower.dtype), vision["image_grid_thw"]
        return self._features(tower(pixels, grid_thw=grids.to(tower.device), return_dict=True)).split(_merged(tower, grids))

    def hf_name(self, name: str) -> str:
        return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)

    def _decoder(self, model: Any) -> Any:
        return model.model.language_model

    def _inputs(self, model: Any, packed: Packed, part: Slice) -> dict[str, Any]:
        """Images fill placeholders in prompts only: a placeholder sampled in a response is an ordinary token.

        transformers' own forward pass counts those too, and refuses the sample.
        """
        places = self._placeholders(packed)
        embedded = lookup(model.get_input_embeddings().weight, part.cut(packed.input_ids).to(model.device))
        positions = part.cut(packed.position_ids.expand(3, -1))[:, None].to(model.device)
        if not len(places):
            return {"inputs_embeds": (embedded + _nothing_of(self.vision_tower(model)))[None], "position_ids": positions}
        held = part.held(places)
        images = self._images(model, [vision for vision in packed.vision if vision is not None], part)
        here = images[held.to(model.device)].to(embedded.dtype)
        return {**self._placed(embedded, (places[held] - part.start).to(model.device), here), "position_ids": positions}

    def _features(self, output: Any) -> Tensor:
        """[tokens, D]: what the tower's output gives the text model."""
        return output.pooler_output

    def _placed(self, embedded: Tensor, places: Tensor, images: Tensor) -> dict[str, Any]:
        """Arguments of the decoder: embeddings [t, D] with the images' features [m, ...] at `places` [m]."""
        return {"inputs_embeds": embedded.index_copy(0, places, images)[None]}

    def _placeholders(self, packed: Packed) -> Tensor:
        """[tokens]: indices in T of the prompts' image placeholders, on the host. RunError names a row whose images have
        another number of tokens."""
        placeholder, places = packed.input_ids == self.processor.image_token_id, []
        for segment, name, vision in zip(packed.segments, packed.names, packed.vision, strict=True):
            here = placeholder[segment.start : segment.start + segment.prompt].nonzero()[:, 0]
            tokens, features = self._counts(vision)
            if not len(here) == tokens == features:
                raise RunError(
                    f"{name}: the prompt has {len(here)} image placeholders, its images have {tokens} tokens and features of"
                    f" {features}; a prompt and its images are to be encoded together, by one image processor"
                )
            places.append(here + segment.start)
        return torch.cat(places)

    def _counts(self, vision: Vision | None) -> tuple[int, int]:
        """Number of tokens of a prompt's images: by their sizes, and by their features or pixels."""
        if vision is None:
            return 0, 0
        merged = self.processor.image_processor.merge_size**2
        features = len(vision["image_embeds"]) if "image_embeds" in vision else len(vision["pixel_values"]) // merged
        return int(vision["image_grid_thw"].prod(-1).sum()) // merged, features

    def _images(self, model: Any, vision: Sequence[Vision], part: Slice) -> Tensor:
        """[tokens, ...] of all images: precomputed, or from the vision tower now, with the images split over the ranks that
        share the row."""
        if "image_embeds" in vision[0]:
            return torch.cat([prompt["image_embeds"] for prompt in vision]).to(model.device)
        tower, grids = self.vision_tower(model), torch.cat([prompt["image_grid_thw"] for prompt in vision])
        pixels = torch.cat([prompt["pixel_values"] for prompt in vision]).split(grids.prod(-1).tolist())

        def read(images: Sequence[int]) -> Sequence[Tensor]:
            chosen = torch.cat([pixels[image] for image in images])
            return self.embed_images(tower, {"pixel_values": chosen, "image_grid_thw": grids[images]})

        return torch.cat(part.dealt(_merged(tower, grids), read))

    def _messages(self, row: Row) -> list[Mapping[str, Any]]:
        if image_parts(row) != len(row.images):
            raise ConfigError(
                f"{row.id}: the messages have {image_parts(row)} image parts for {len(row.images)} images;"
                " give each image one part {type: image}, where it belongs in the text"
            )
        return list(row.messages)

    def _read(self, row: Row) -> tuple[str, list[int]]:
        text, token_ids = super()._read(row)
        self._check_placeholders(row, token_ids.count(self.processor.image_token_id))
        return text, token_ids

    def _check_placeholders(self, row: Row, placeholders: int) -> None:
        if placeholders != len(row.images):
            raise ConfigError(
                f"{row.id}: the chat template wrote {placeholders} {self.processor.image_token} for {len(row.images)} images;"
                " either the text itself holds that token or the model's chat template ignores image parts"
            )

    def _image_tokens(self, row: Row) -> list[int]:
        """Number of tokens of each image."""
        processor = self.processor.image_processor
        counts = []
        for index, (width, height) in enumerate(sizes(row.images)):
            try:
                patches = processor.get_number_of_image_patches(height, width, {})
            except (ValueError, ZeroDivisionError) as error:
                size = f"{width}x{height} pixels"
                raise ConfigError(f"{row.id}: image {index} ({size}) does not fit the processor: {error}") from None
            counts.append(patches // processor.merge_size**2)
        return counts


def _limits(folder: Path, processor: Any, least: int | None, most: int | None) -> dict[str, int]:
    """Least and most pixels of an image, as transformers' processors take them: under the names of edges."""
    own, unit = dict(processor.size), (processor.patch_size * processor.merge_size) ** 2
    if most is not None and most < unit:
        raise ConfigError(f"vision.max_pixels: {most} is less than one image token, {unit} pixels; give at least {unit}")
    low, high = least or own.get("shortest_edge"), most or own.get("longest_edge")
    if low is None or high is None:
        raise ConfigError(
            f"model.path: {folder} has no limits of an image (size.shortest_edge and size.longest_edge of its image processor);"
            " set vision.min_pixels and vision.max_pixels"
        )
    if low > high:
        given, other = ("min_pixels", "max_pixels") if most is None else ("max_pixels", "min_pixels")
        raise ConfigError(
            f"vision.{given}: with the model folder's own {other} an image would have at least {low} and at most {high} pixels;"
            f" set vision.{other} too"
        )
    return {"shortest_edge": low, "longest_edge": high}


def _merged(tower: Any, grids: Tensor) -> list[int]:
    """Tokens of each image, given patches [I, 3]."""
    return (grids.prod(-1) // tower.spatial_merge_size**2).tolist()


def _nothing_of(tower: nn.Module) -> Tensor | float:
    """0, with zero gradients for the tower's trainable weights: in a sharded model every rank needs a gradient of every weight,
    whether its row has an image or not."""
    weights = [weight for weight in tower.parameters() if weight.requires_grad]
    return sum((weight.sum() for weight in weights), start=torch.zeros((), device=weights[0].device)) * 0 if weights else 0.0


def multimodal_positions(token_ids: Sequence[int], image_token_id: int, grids: Sequence[Sequence[int]]) -> Tensor:
    """[3, P]: time, height and width of each token (multimodal rotary positions, Qwen2-VL, arXiv 2409.12191).

    Text advances the three axes together; the tokens of an image lie at the (t, h, w) of its merged `grids` entry, counted
    from the position it starts at; what follows starts after the largest position so far.
    """
    axes: list[Tensor] = []
    done = position = 0
    for grid in grids:
        text = list(token_ids).index(image_token_id, done) - done
        axes.append(torch.arange(position, position + text).expand(3, -1))
        position += text
        axes.append(torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij")).flatten(1) + position)
        position += max(grid)
        done += text + axes[-1].shape[1]
    axes.append(torch.arange(position, position + len(token_ids) - done).expand(3, -1))
    return torch.cat(axes, dim=1)
