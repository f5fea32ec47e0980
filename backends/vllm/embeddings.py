"""Embedded images in a request to a vLLM server, in the wire format of its scale-out API: one msgpack item per image."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from rlcore.types import Vision

_RAW = 3  # extension type of bytes


class ImageFeatures:
    """Makes `features` of /inference/v1/generate for the images of a prompt."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._image_token: int = config["image_token_id"]
        self._merged: int = config["vision_config"]["spatial_merge_size"] ** 2  # patches per token

    def __call__(self, token_ids: Sequence[int], vision: Vision) -> dict[str, Any]:
        """`token_ids`: with one placeholder per merged patch. `vision`: image_embeds [tokens, D] and image_grid_thw [I, 3]."""
        grids = vision["image_grid_thw"]
        sizes = [math.prod(grid) // self._merged for grid in grids.tolist()]
        items = [_item(*image) for image in zip(vision["image_embeds"].split(sizes), grids, strict=True)]
        return {
            "mm_hashes": {"image": [hashlib.sha256(item).hexdigest() for item in items]},
            "mm_placeholders": {"image": list(self._ranges(token_ids, sizes))},
            "kwargs_data": {"image": [base64.b64encode(item).decode() for item in items]},
        }

    def _ranges(self, token_ids: Sequence[int], sizes: Sequence[int]) -> Iterator[dict[str, int]]:
        end = 0
        for size in sizes:
            start = token_ids.index(self._image_token, end)
            end = start + size
            yield {"offset": start, "length": size}


def _item(embeds: Tensor, grid: Tensor) -> bytes:
    """vLLM's MultiModalKwargsItem: by name, its data and how those of several images are joined."""
    flat = ["flat", {"keep_on_cpu": False, "slices": [[None, None, None]], "dim": 0}]
    fields = {
        "image_embeds": {"data": _tensor(embeds), "field": flat},
        "image_grid_thw": {"data": _tensor(grid), "field": ["batched", {"keep_on_cpu": True}]},
    }
    return msgspec.msgpack.encode(fields)


def _tensor(tensor: Tensor) -> list[Any]:
    raw = tensor.detach().cpu().contiguous()
    data = raw.reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(raw.dtype).removeprefix("torch."), list(raw.shape), msgspec.msgpack.Ext(_RAW, data)]
