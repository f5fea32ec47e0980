"""Layout of safetensors files.

Format: 8 bytes little-endian header length, a JSON header with dtype, shape and byte range of each tensor, the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def meta(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def header(specs: Mapping[str, Spec]) -> bytes:
    """Of a file with these tensors in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        entries[name] = {
            "dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes],
        }  # fmt: skip
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_name(stem: str) -> str:
    """File that says which file has which tensor, where there are several."""
    return f"{stem}.safetensors.index.json"


def files(stem: str, specs: Mapping[str, Spec], limit: int) -> dict[str, list[str]]:
    """Names of tensors by file: `<stem>.safetensors`, or numbered files of at most `limit` bytes (a larger tensor has its
    own)."""
    shards = list(_shards(specs, limit))
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors": names for number, names in enumerate(shards, start=1)}


def index(specs: Mapping[str, Spec], placed: Mapping[str, Iterable[str]]) -> str:
    """Text of the index of `files`: `placed` are the names by file, `specs` all that they hold."""
    size = sum(spec.nbytes for spec in specs.values())
    where = {name: PurePath(file).name for file, names in placed.items() for name in names}
    return json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"


def _shards(specs: Mapping[str, Spec], limit: int) -> Iterator[list[str]]:
    shard, held = list[str](), 0
    for name, spec in specs.items():
        if shard and held + spec.nbytes > limit:
            yield shard
            shard, held = [], 0
        shard.append(name)
        held += spec.nbytes
    yield shard
