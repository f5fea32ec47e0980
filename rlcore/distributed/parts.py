"""What a rank holds of a tensor: written to a file, and read back by any number of ranks.

Files are safetensors. Where one has parts of tensors, its header says where each part begins, in the form of
HuggingFaceStorageWriter (torch.distributed.checkpoint), whose reader reads these files too; the rest is whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rlcore.distributed import world
from rlcore.errors import ConfigError

_PLACES, _BEGINS = "DCP_SHARDING_INFO", "saved_offsets"


@dataclass(frozen=True)
class Part:
    """A block of a tensor."""

    tensor: Tensor
    begins: Sequence[int]  # in the whole tensor, one number per dimension


def own(tensor: Tensor) -> Part | None:
    """A copy of this rank's part in host memory; None for a part that is empty or that another rank has to write."""
    if not isinstance(tensor, DTensor):
        return Part(_copy(tensor), [0] * tensor.dim()) if world.first() else None
    places = zip(tensor.placements, tensor.device_mesh.get_coordinate() or (), strict=True)
    if any(placement.is_replicate() and coordinate for placement, coordinate in places):
        return None
    part = tensor.to_local()
    return Part(_copy(part), _place(tensor)[1]) if part.numel() else None


def write(path: Path, parts: Mapping[str, Part]) -> None:
    begins = {name: {_BEGINS: list(part.begins)} for name, part in parts.items()}
    save_file({name: part.tensor for name, part in parts.items()}, path, {_PLACES: json.dumps(begins)})


class Stored:
    """The tensors in a folder's safetensors files."""

    def __init__(self, folder: Path) -> None:
        """ConfigError names a file that is not whole."""
        self._folder = folder
        self._blocks: dict[str, list[_Block]] = {}  # by the tensor's name
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ConfigError(f"{path}: not a whole safetensors file: {error}") from None
            begins = json.loads((file.metadata() or {}).get(_PLACES, "{}"))
            for name in file.keys():
                shape = (block := file.get_slice(name)).get_shape()
                first = begins[name][_BEGINS] if name in begins else [0] * len(shape)
                self._blocks.setdefault(name, []).append(_Block(block, first, shape))

    def __contains__(self, name: str) -> bool:
        return name in self._blocks

    def part(self, name: str, like: Tensor) -> Tensor:
        """This rank's part of the tensor, if it is sharded as `like` is; in host memory and the dtype of the files.

        ConfigError if they lack it or some of it, or have it in another shape.
        """
        if name not in self:
            raise ConfigError(f"{self._folder}: no tensor {name}")
        blocks = self._blocks[name]
        whole = [max(ends) for ends in zip(*(block.ends for block in blocks), strict=True)]
        if whole != list(like.shape):
            raise ConfigError(f"{self._folder}: {name} has the shape {whole}, not {list(like.shape)}")
        shape, begins = _place(like)
        read = [(place, block.read(place)) for block in blocks if (place := block.overlap(begins, shape)) is not None]
        if (missing := math.prod(shape) - sum(values.numel() for _, values in read)) > 0:
            raise ConfigError(f"{self._folder}: {missing} of {math.prod(shape)} numbers of {name} are in no file")
        if len(read) == 1:
            return read[0][1]
        found = torch.empty(shape, dtype=read[0][1].dtype if read else like.dtype)
        for place, values in read:
            found[_within(place, begins)] = values
        return found


@dataclass(frozen=True)
class _Block:
    """Part of a tensor in a file."""

    values: Any  # a slice of the file
    begins: Sequence[int]
    shape: Sequence[int]

    @property
    def ends(self) -> list[int]:
        return [begin + length for begin, length in zip(self.begins, self.shape, strict=True)]

    def overlap(self, begins: Sequence[int], shape: Sequence[int]) -> list[tuple[int, int]] | None:
        """What of another block is in this one: first place and the one after the last, by dimension."""
        mine, others = zip(self.begins, self.ends, strict=True), zip(begins, shape, strict=True)
        inside = [
            (max(first, begin), min(last, begin + length))
            for (first, last), (begin, length) in zip(mine, others, strict=True)
        ]
        return inside if all(first < last for first, last in inside) else None

    def read(self, place: Sequence[tuple[int, int]]) -> Tensor:
        return self.values[_within(place, self.begins) or ...]


def sharded(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which every rank holds a `part`, sharded and on the device as `like` is."""
    if not isinstance(like, DTensor):
        return part.to(like.device)
    whole = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole.to(like.device)  # which may rest in host memory, and `from_local` moves to the mesh's device


def fill(named: Iterable[tuple[str, Tensor]], stored: Stored) -> None:
    """Copy this rank's part of each tensor of that name."""
    with torch.no_grad():
        for name, tensor in named:
            world.part(tensor).copy_(stored.part(name, tensor))


def _within(place: Sequence[tuple[int, int]], begins: Sequence[int]) -> tuple[slice, ...]:
    """The place as slices of a block that begins there."""
    return tuple(slice(first - begin, last - begin) for (first, last), begin in zip(place, begins, strict=True))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _place(tensor: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """Shape and beginning of this rank's part."""
    if not isinstance(tensor, DTensor):
        return tensor.shape, [0] * tensor.dim()
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
