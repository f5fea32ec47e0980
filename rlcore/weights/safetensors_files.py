"""Safetensors files, read by position (a mapped file's pages would count as the process's memory) and written in a stream."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlcore import tensor_files
from rlcore.errors import ConfigError
from rlcore.model_files import INDEX
from rlcore.tensor_files import DTYPES, Spec
from rlcore.weights.tensors import Weights, few


def read_bytes(path: Path, offset: int, length: int, what: str) -> bytearray:
    """`length` bytes of a file; ConfigError, naming the file and `what`, when it has fewer."""
    data = bytearray(length)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            found = file.readinto(data)
    except OSError as error:
        raise ConfigError(f"{path}: {what} cannot be read: {error}") from None
    if found != length:
        raise ConfigError(f"{path}: truncated: {what} needs {length} bytes, {found} are there; copy the file again")
    return data


def tensor_of(data: bytearray, spec: Spec) -> Tensor:
    """The tensor that these bytes hold, which keeps them."""
    return (torch.frombuffer(data, dtype=spec.dtype) if data else torch.empty(0, dtype=spec.dtype)).reshape(spec.shape)


def open_file(path: Path) -> Weights:
    """One file's tensors in the order of their bytes; ConfigError when the file is not whole."""
    places = _places(path)
    specs = {name: spec for name, (spec, _) in places.items()}
    return Weights(specs, lambda name: tensor_of(read_bytes(path, places[name][1], specs[name].nbytes, name), specs[name]))


def open_folder(folder: Path) -> Weights:
    """Tensors of a model folder: model.safetensors, or the files of its index. ConfigError for missing or damaged files."""
    listed = _index(folder)
    files = sorted(set(listed.values())) if listed else [path.name for path in sorted(folder.glob("*.safetensors"))]
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise ConfigError(f"{folder / missing[0]}: missing ({len(missing)} of {len(files)} files that {INDEX} names)")
    if not files:
        raise ConfigError(f"{folder}: no *.safetensors in it; give the folder that holds the weights")
    opened = {name: open_file(folder / name) for name in files}
    places = {name: file for file, weights in opened.items() for name in weights.specs}
    if lost := [name for name, file in listed.items() if name not in opened[file].specs]:
        raise ConfigError(f"{folder / listed[lost[0]]}: {few(lost)} not in it, where {INDEX} says; copy the folder again")
    specs = {name: spec for weights in opened.values() for name, spec in weights.specs.items()}
    return Weights(specs, lambda name: opened[places[name]].read(name))


def _index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not an index of safetensors: {error!r}") from None


def _places(path: Path) -> dict[str, tuple[Spec, int]]:
    """Spec and position in the file of each tensor."""
    size = path.stat().st_size
    length = int.from_bytes(read_bytes(path, 0, 8, "its header"), "little")
    if length > size:
        raise ConfigError(f"{path}: not safetensors, or truncated: a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(read_bytes(path, 8, length, "its header"))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        entries.sort(key=lambda item: item[1]["data_offsets"][0])
        places = {name: _place(entry, 8 + length) for name, entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not safetensors: {error!r}") from None
    for name, (spec, start) in places.items():
        if start + spec.nbytes > size:
            raise ConfigError(f"{path}: truncated: {name} ends at byte {start + spec.nbytes} of {size}; copy the file again")
    return places


def _place(entry: Mapping[str, Any], data: int) -> tuple[Spec, int]:
    spec = Spec(tuple(entry["shape"]), DTYPES[entry["dtype"]])
    start, end = entry["data_offsets"]
    if end - start != spec.nbytes:
        raise ValueError(f"{end - start} bytes for {spec}")
    return spec, data + start


def write_file(path: Path, names: Sequence[str], weights: Weights) -> None:
    """Write these tensors, one in memory at a time."""
    with path.open("wb") as file:
        file.write(tensor_files.header({name: weights.specs[name] for name in names}))
        for name in names:
            file.write(bytes_of(weights.read(name), weights.specs[name], name))


def bytes_of(tensor: Tensor, spec: Spec, name: str) -> memoryview:
    """The tensor's memory."""
    assert tuple(tensor.shape) == spec.shape and tensor.dtype == spec.dtype, f"{name}: {tensor.shape}, {tensor.dtype}"
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def write_folder(folder: Path, weights: Weights, shard_bytes: int) -> None:
    """Write model.safetensors, or numbered files of at most `shard_bytes` (a larger tensor has its own) and an index."""
    placed = tensor_files.files("model", weights.specs, shard_bytes)
    for file, names in placed.items():
        write_file(folder / file, names, weights)
    if len(placed) > 1:
        (folder / INDEX).write_text(tensor_files.index(weights.specs, placed), encoding="utf-8")
