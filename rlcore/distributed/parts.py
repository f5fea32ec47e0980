"""What a rank holds of a tensor, and what it reads of the whole tensors in files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rlcore.distributed import world
from rlcore.errors import ConfigError

Published = Callable[[str, Sequence[int]], Mapping[str, Sequence[int]]]
"""Names and shapes of the tensors that files have in place of a model's tensor, given its name and shape. One after another,
their elements are its own; where they are several, each is made of whole rows of it."""


def as_named(name: str, shape: Sequence[int]) -> Mapping[str, Sequence[int]]:
    """`Published` for files with the model's own names."""
    return {name: shape}


def published(named: Iterable[tuple[str, Tensor]], names: Published) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors under the names of files: a tensor that is one there as it is, whole or sharded; of one that is several
    there, views of those that this rank holds."""
    for name, tensor in named:
        parts = names(name, tensor.shape)
        only, *more = parts
        if not more and list(parts[only]) == list(tensor.shape):
            yield only, tensor
        else:
            yield from _split(tensor, parts)


def _split(tensor: Tensor, parts: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
    assert not isinstance(tensor, DTensor) or all(one == Shard(0) or one.is_replicate() for one in tensor.placements), "by rows"
    elements, begin = world.part(tensor).view(-1), 0
    first = _place(tensor)[1][0] * tensor.stride(0)
    for name, shape in parts.items():
        if first <= begin < first + len(elements):
            yield name, elements[begin - first :][: math.prod(shape)].view(*shape)
        begin += math.prod(shape)


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a tensor, copied to host memory."""

    tensor: Tensor
    begin: int  # elements of the whole tensor before them


def own_rows(tensor: Tensor, dtype: torch.dtype) -> Rows | None:
    """A copy of the rows that this rank has to write; None if others write them all. Collective where a tensor is sharded, but
    not by rows."""
    if not isinstance(tensor, DTensor):
        return Rows(_copy(tensor, dtype), 0) if world.first() and tensor.numel() else None
    by_rows = [placement if placement == Shard(0) else Replicate() for placement in tensor.placements]
    if by_rows != list(tensor.placements):
        tensor = tensor.redistribute(placements=by_rows)
    part, places = tensor.to_local(), zip(by_rows, tensor.device_mesh.get_coordinate() or (), strict=True)
    if not part.numel() or any(placement.is_replicate() and coordinate for placement, coordinate in places):
        return None
    return Rows(_copy(part, dtype), _place(tensor)[1][0] * part[0].numel() if part.dim() else 0)


class Stored:
    """The tensors in a folder's safetensors files."""

    def __init__(self, folder: Path) -> None:
        """ConfigError names a file that is not whole."""
        self._folder = folder
        self._slices: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ConfigError(f"{path}: not a whole safetensors file: {error}") from None
            self._slices |= {name: file.get_slice(name) for name in file.keys()}

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def part(self, name: str, like: Tensor) -> Tensor:
        """This rank's part of the tensor, if it is sharded as `like` is; in host memory and the dtype of the file.

        ConfigError if no file has it, or in another shape.
        """
        if name not in self:
            raise ConfigError(f"{self._folder}: no tensor {name}")
        stored = self._slices[name]
        if (whole := stored.get_shape()) != list(like.shape):
            raise ConfigError(f"{self._folder}: {name} has the shape {whole}, not {list(like.shape)}")
        place = zip(*_place(like), strict=True)
        return stored[tuple(slice(begin, begin + length) for length, begin in place) or ...]


def sharded(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which every rank holds a `part`, sharded and on the device as `like` is."""
    if not isinstance(like, DTensor):
        return part.to(like.device)
    whole = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole.to(like.device)  # which may rest in host memory, and `from_local` moves to the mesh's device


def fill(named: Iterable[tuple[str, Tensor]], stored: Stored, names: Published = as_named) -> None:
    """Copy this rank's part of each tensor; `names` are those that the files have."""
    with torch.no_grad():
        for name, tensor in published(named, names):
            world.part(tensor).copy_(stored.part(name, tensor))


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def _place(tensor: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """Shape and beginning of this rank's part."""
    if not isinstance(tensor, DTensor):
        return tensor.shape, [0] * tensor.dim()
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
