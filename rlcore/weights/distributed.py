"""Checkpoints of `torch.distributed.checkpoint` (DCP), read and written by one process, one chunk at a time.

A folder holds `.metadata`, a pickle of each tensor's shape and chunks and of where each chunk is, and `.distcp` files in which
every chunk is a file of `torch.save` of its own.
"""

from __future__ import annotations

import enum
import importlib
import io
import pathlib
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from rlcore.errors import ConfigError
from rlcore.weights.pickles import StandIn, read_stored, save, stored_at
from rlcore.weights.tensors import Spec, Weights

METADATA = ".metadata"
_OF_DCP = tuple(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner"))
_VALUES = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"), ("torch.distributed.checkpoint._extension", "StreamTransformExtension"),
}  # fmt: skip


@dataclass(frozen=True)
class _Chunk:
    start: tuple[int, ...]
    sizes: tuple[int, ...]
    place: _StorageInfo


def open_folder(folder: Path, stand_ins: Sequence[str] = ()) -> tuple[Weights, dict[str, list[_Chunk]]]:
    """The folder's tensors, and each one's chunks. Classes of `.metadata` whose full name begins with one of `stand_ins` are
    replaced; ConfigError names the file that is missing, damaged or refused."""
    metadata = _metadata(folder / METADATA, stand_ins)
    tensors = {name: one for name, one in metadata.state_dict_metadata.items() if isinstance(one, TensorStorageMetadata)}
    specs = {name: Spec(tuple(one.size), one.properties.dtype) for name, one in tensors.items()}
    places = {(index.fqn, torch.Size(index.offset or ())): place for index, place in metadata.storage_data.items()}
    try:
        chunks = {
            name: [_Chunk(tuple(c.offsets), tuple(c.sizes), places[name, c.offsets]) for c in one.chunks]
            for name, one in tensors.items()
        }
    except KeyError as error:
        raise ConfigError(f"{folder / METADATA}: damaged: it does not say where {error} is") from None
    _check_files(folder, metadata.storage_data.values())
    return Weights(specs, lambda name: _whole(folder, specs[name], chunks[name], name)), chunks


def part(folder: Path, spec: Spec, chunks: Sequence[_Chunk], first: tuple[int, ...], name: str) -> Tensor:
    """`tensor[first]` for leading indices `first`, read from the chunks that touch it alone."""
    whole = torch.empty(spec.shape[len(first) :], dtype=spec.dtype)
    depth, filled = len(first), 0
    for chunk in chunks:
        if all(low <= at < low + size for at, low, size in zip(first, chunk.start, chunk.sizes, strict=False)):
            values = _read(folder, chunk, name)[tuple(at - low for at, low in zip(first, chunk.start, strict=False))]
            where = zip(chunk.start[depth:], chunk.sizes[depth:], strict=True)
            whole[tuple(slice(low, low + size) for low, size in where)] = values
            filled += values.numel()
    if filled != whole.numel():
        raise ConfigError(f"{folder}: {name}{list(first) or ''}: its chunks hold {filled} of {whole.numel()} values")
    return whole


def _whole(folder: Path, spec: Spec, chunks: Sequence[_Chunk], name: str) -> Tensor:
    return part(folder, spec, chunks, (), name)


def _read(folder: Path, chunk: _Chunk, name: str) -> Tensor:
    path = folder / chunk.place.relative_path
    if chunk.place.transform_descriptors:
        raise ConfigError(f"{path}: {name} is stored as {chunk.place.transform_descriptors}; save it without compression")
    try:
        one = stored_at(path, chunk.place.offset, chunk.place.length)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ConfigError(f"{path}: {name} does not load: {' '.join(str(error).split())[:200]}") from None
    if one.shape != chunk.sizes:
        raise ConfigError(f"{path}: {name}: a chunk is {list(one.shape)}, {METADATA} says {list(chunk.sizes)}")
    return read_stored(path, one, name)


def _check_files(folder: Path, places: Iterable[_StorageInfo]) -> None:
    ends: dict[str, int] = {}
    for one in places:
        ends[one.relative_path] = max(ends.get(one.relative_path, 0), one.offset + one.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"{path}: missing; {METADATA} names {len(ends)} files")
        if path.stat().st_size < end:
            raise ConfigError(f"{path}: truncated: {path.stat().st_size} of at least {end} bytes; copy the folder again")


class _Unpickler(pickle.Unpickler):
    """Loads the classes of a `.metadata` file and nothing else."""

    def __init__(self, file: BinaryIO, stand_ins: Sequence[str]) -> None:
        super().__init__(file)
        self._stand_ins = tuple(stand_ins)

    def find_class(self, module_name: str, global_name: str) -> Any:
        found = f"{module_name}.{global_name}"
        if self._stand_ins and found.startswith(self._stand_ins):
            return StandIn
        value: Any = None
        if module_name in _OF_DCP or (module_name, global_name) in _VALUES or module_name == "torch":
            value = getattr(importlib.import_module(module_name), global_name, None)
        kind = isinstance(value, type) and value.__module__ == module_name
        if (kind and (is_dataclass(value) or issubclass(value, enum.Enum))) or isinstance(value, torch.dtype):
            return value
        if value is not None and (module_name, global_name) in _VALUES:
            return pathlib.PurePosixPath if module_name == "pathlib" else value
        raise pickle.UnpicklingError(f"it holds {found}")


def _metadata(path: Path, stand_ins: Sequence[str]) -> Metadata:
    try:
        data = path.read_bytes()
        metadata = _Unpickler(io.BytesIO(data), stand_ins).load()
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing; a distributed checkpoint has it") from None
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path}: refused: its pickle holds more than a checkpoint's metadata: {error}") from None
    except (OSError, EOFError, AttributeError, TypeError, ValueError, IndexError, KeyError, ImportError) as error:
        raise ConfigError(f"{path}: damaged: {error!r}") from None
    if not isinstance(metadata, Metadata):
        raise ConfigError(f"{path}: not the metadata of a checkpoint but a {type(metadata).__name__}")
    return metadata


@dataclass
class Writer:
    """Writes chunks as they come; `close` writes `.metadata`."""

    folder: Path
    _tensors: dict[str, TensorStorageMetadata] = field(default_factory=dict)
    _objects: dict[str, BytesStorageMetadata] = field(default_factory=dict)
    _places: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)
    _ends: dict[str, int] = field(default_factory=dict)

    def add(self, file: str, name: str, shape: Sequence[int], start: Sequence[int], values: Tensor) -> None:
        """Write `values`, the chunk of the tensor `name` [*shape] that begins at `start`."""
        properties = TensorProperties(dtype=values.dtype)
        entry = self._tensors.setdefault(name, TensorStorageMetadata(properties, torch.Size(shape), []))
        assert entry.size == torch.Size(shape) and entry.properties.dtype == values.dtype, name
        entry.chunks.append(ChunkStorageMetadata(torch.Size(start), values.shape))
        own = values.clone(memory_format=torch.contiguous_format)  # torch.save writes all of a storage, of a view too
        self._put(file, MetadataIndex(name, start, len(entry.chunks) - 1), own)
        own.untyped_storage().resize_(0)  # torch.save leaves it in a reference cycle

    def add_object(self, file: str, name: str, value: Any) -> None:
        self._objects[name] = BytesStorageMetadata()
        self._put(file, MetadataIndex(name), value)

    def close(self) -> None:
        metadata = Metadata(state_dict_metadata={**self._tensors, **self._objects}, storage_data=self._places)
        (self.folder / METADATA).write_bytes(pickle.dumps(metadata))

    def _put(self, file: str, index: MetadataIndex, value: Any) -> None:
        with (self.folder / file).open("ab") as output:
            start = self._ends.get(file, 0)
            item: Any = _Counted(output)
            save(value, item)
        self._ends[file] = start + item.written
        self._places[index] = _StorageInfo(file, start, item.written)


class _Counted(io.RawIOBase):
    """Passes bytes on and counts them: a zip file's positions begin at 0 wherever it is written."""

    def __init__(self, output: BinaryIO) -> None:
        self._output, self.written = output, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        count = self._output.write(data)
        self.written += count
        return count

