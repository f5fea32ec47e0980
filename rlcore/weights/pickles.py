"""Tensors in files of `torch.save`: unpickled with `weights_only=True` and without their data, which is read by position.

DTensors are on torch's own list of safe classes once `torch.distributed.tensor` is imported. Classes of other programs that a
checkpoint carries beside its weights can be replaced by inert stand-ins, so that nothing of theirs is imported or run.
"""

from __future__ import annotations

import io
import logging
import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, Shard

from rlcore.errors import ConfigError
from rlcore.weights.safetensors_files import bytes_of, read_bytes
from rlcore.weights.tensors import Spec, Weights


@dataclass(frozen=True)
class Stored:
    """Where a tensor, or a rank's shard of a DTensor, is in its file."""

    shape: tuple[int, ...]  # of the whole tensor
    local: Spec  # of what this file holds
    stride: tuple[int, ...]
    start: int  # byte in the file
    mesh: tuple[int, ...] = ()  # ranks along each dimension of the device mesh
    splits: tuple[int | None, ...] = ()  # along each, the tensor's dimension that is split; None: replicated

    @property
    def spec(self) -> Spec:
        return Spec(self.shape, self.local.dtype)


class StandIn:
    """Takes the place of an object that nobody needs."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def stored(path: Path, ignored: Sequence[str] = ()) -> Any:
    """The file's object with a `Stored` in place of each tensor in its dicts. Classes whose full name begins with one of
    `ignored` become stand-ins; any other class that is not a tensor's is refused. ConfigError names the file."""
    try:
        return _located(_unpickled(path, ignored), str(path))
    except pickle.UnpicklingError as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
        reason = lines[0] if lines else " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: refused: its pickle holds more than tensors: {reason}") from None
    except (RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: not a whole file of torch.save: {' '.join(str(error).split())[:200]}") from None


def read_stored(path: Path, one: Stored, name: str) -> Tensor:
    """Its values in this file."""
    shape, stride = one.local.shape, one.stride
    extent = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    data = read_bytes(path, one.start, extent * one.local.dtype.itemsize, name)
    flat = torch.frombuffer(data, dtype=one.local.dtype) if data else torch.empty(0, dtype=one.local.dtype)
    return flat.as_strided(shape, stride).contiguous()


def open_pickle(path: Path) -> Weights:
    """A state dict in one file; ConfigError when it is something else, or holds shards of tensors."""
    found = stored(path)
    if not isinstance(found, Mapping) or not (entries := {k: v for k, v in found.items() if isinstance(v, Stored)}):
        raise ConfigError(f"{path}: no state dict: it holds a {type(found).__name__} without tensors")
    if parts := [name for name, one in entries.items() if one.local.shape != one.shape]:
        raise ConfigError(f"{path}: {parts[0]} is one rank's part of a tensor; give the folder with those of all ranks")
    specs = {name: one.spec for name, one in entries.items()}
    return Weights(specs, lambda name: read_stored(path, entries[name], name))


def write_pickle(path: Path, key: str, weights: Weights, more: Mapping[str, Any]) -> None:
    """Write what `torch.save({key: state dict, **more})` does, one tensor in memory at a time. As with torch's own
    `compute_crc32=False`, the archive's checksums are not set; torch does not read them."""
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True), path.open("wb") as file:
        without_data = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in weights.specs.items()}
        save({key: without_data, **more}, file)
    places = stored(path)[key]
    with path.open("r+b") as file:
        for name, spec in weights.specs.items():
            file.seek(places[name].start)
            file.write(bytes_of(weights.read(name), spec, name))


def save(value: Any, file: IO[bytes]) -> None:
    """`torch.save`, but an error of the file is raised as that, and not as torch's about the archive it could not finish."""
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError | KeyboardInterrupt):
            raise error.__context__ from None
        raise


def stored_at(path: Path, start: int, length: int) -> Stored:
    """Where in the file the tensor is that `torch.save` wrote into these bytes of it."""
    with path.open("rb") as file, FakeTensorMode():
        section: Any = _Section(file, start, length)
        fake = torch.load(section, map_location="cpu", weights_only=True)
    return Stored(tuple(fake.shape), Spec(tuple(fake.shape), fake.dtype), fake.stride(), start + _start(fake))


class _Section(io.RawIOBase):
    """Some bytes of a file, as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def assembled(pieces: Sequence[Tensor], one: Stored) -> Tensor:
    """The whole tensor from every rank's piece, in rank order. Ranks count through the mesh with its last dimension fastest;
    a tensor is split along the mesh's first dimension first."""
    for size, split in zip(reversed(one.mesh), reversed(one.splits), strict=True):
        groups = [pieces[start : start + size] for start in range(0, len(pieces), size)]
        pieces = [group[0] if split is None else torch.cat(list(group), split) for group in groups]
    return pieces[0]


def _unpickled(path: Path, ignored: Sequence[str]) -> Any:
    allowed: list[Any] = []
    if ignored:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        allowed = [(StandIn, name) for name in unsafe if name.startswith(tuple(ignored))]
    with torch.serialization.safe_globals(allowed), FakeTensorMode(), _quiet():
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a DeviceMesh is unpickled outside its process group."""
    log = logging.getLogger("torch.distributed.device_mesh")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _located(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _located(one, f"{where}: {key}") for key, one in value.items()}
    if isinstance(value, DTensor):
        return _shard(value, where)
    if isinstance(value, Tensor):
        return Stored(tuple(value.shape), Spec(tuple(value.shape), value.dtype), value.stride(), _start(value))
    return value


def _shard(tensor: DTensor, where: str) -> Stored:
    local, placements = tensor._local_tensor, tensor._spec.placements
    if unknown := [placement for placement in placements if type(placement) not in (Shard, Replicate)]:
        raise ConfigError(f"{where} is placed as {unknown[0]}; only shards and replicas can be put together")
    splits = tuple(placement.dim if isinstance(placement, Shard) else None for placement in placements)
    mesh = tuple(tensor._spec.mesh.shape)
    return Stored(tuple(tensor.shape), Spec(tuple(local.shape), local.dtype), local.stride(), _start(local), mesh, splits)


def _start(tensor: Tensor) -> int:
    """Byte of the file at which the tensor's first element is (torch notes it on storages that it loads without data)."""
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        if math.prod(tensor.shape):
            raise ConfigError("saved by a version of torch before 1.6; load and save it again with a newer one")
        return 0
    return offset + tensor.storage_offset() * tensor.dtype.itemsize
