"""Convert a model's weights from one format to another: read, accounted for, written, read back, compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rlcore import registry
from rlcore.errors import ConfigError, RunError
from rlcore.weights.output import drafted
from rlcore.weights.safetensors_files import bytes_of
from rlcore.weights.tensors import Spec, Weights, as_dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Conversion:
    """What was asked for."""

    source: str  # formats
    target: str
    input: Path
    output: Path
    base: Path | None = None
    dtype: str | None = None  # None keeps each tensor's
    shard_bytes: int = 5 * 10**9
    reading: Mapping[str, Any] = field(default_factory=dict)  # the source format's options
    writing: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Converted:
    """What was written."""

    tensors: int
    nbytes: int
    untied: bool  # the head is stored apart from the embedding, against the base model's config


def convert(asked: Conversion) -> Converted:
    """Convert. ConfigError, and no output, for a checkpoint that is incomplete, damaged or another model's, an output folder in
    use and a full disk; RunError when what was written reads back differently."""
    reader, writer = (registry.load("weight_formats", name)() for name in (asked.source, asked.target))
    if not hasattr(writer, "write"):
        raise ConfigError(f"TO: {asked.target} can be read, not written; to what it is written: {', '.join(_writable())}")
    base = asked.base.expanduser().absolute() if asked.base else None
    asked = replace(asked, input=asked.input.expanduser().absolute(), base=base)
    if not asked.input.exists():
        raise ConfigError(f"--input: {asked.input}: no such file or folder")
    again = asked.source == asked.target and base is None and hasattr(reader, "split")
    return _split_again(asked, reader) if again else _converted(asked, reader, writer)


def _converted(asked: Conversion, reader: Any, writer: Any) -> Converted:
    reading = registry.checked_options(reader.read, asked.reading, "from.", given=2)
    writing = registry.checked_options(writer.write, asked.writing, "to.", given=2)
    content = reader.read(asked.input, asked.base, **reading)
    witness = _Witness()
    weights = witness.of(as_dtype(content.weights, _dtype(asked)))
    adapter = replace(content.adapter, factors=witness.of(content.adapter.factors)) if content.adapter else None
    content = replace(content, weights=weights, adapter=adapter)
    with drafted(asked.output, asked.shard_bytes, _call(asked, weights, content.model.folder)) as draft:
        witness.compare(writer.write(content, draft, **writing), asked.output)
    return Converted(len(weights.specs), weights.nbytes, content.untied)


def _split_again(asked: Conversion, one: Any) -> Converted:
    reading = registry.checked_options(one.whole, asked.reading, "from.", given=1)
    writing = registry.checked_options(one.split, asked.writing, "to.", given=2)
    witness = _Witness()
    weights = witness.of(as_dtype(one.whole(asked.input, **reading), _dtype(asked)))
    with drafted(asked.output, asked.shard_bytes, _call(asked, weights, None)) as draft:
        witness.compare(one.split(weights, draft, **writing), asked.output)
    return Converted(len(weights.specs), weights.nbytes, untied=False)


def _dtype(asked: Conversion) -> torch.dtype | None:
    return DTYPES[asked.dtype] if asked.dtype else None


def _call(asked: Conversion, weights: Weights, base: Path | None) -> dict[str, Any]:
    """What the output's record says of the conversion."""
    options = {"from": dict(asked.reading), "to": dict(asked.writing)}
    names = {"from": asked.source, "to": asked.target, "input": str(asked.input), "base": str(base) if base else None}
    return {**names, "tensors": len(weights.specs), "options": options}


def _writable() -> list[str]:
    return [name for name in registry.names("weight_formats") if hasattr(registry.load("weight_formats", name), "write")]


class _Witness:
    """Remembers a digest of each tensor that a writer reads."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Spec, bytes]] = {}

    def of(self, source: Weights) -> Weights:
        def read(name: str) -> torch.Tensor:
            tensor = source.read(name)
            self._seen[name] = source.specs[name], _digest(source, name, tensor)
            return tensor

        return Weights(source.specs, read)

    def compare(self, written: Weights, output: Path) -> None:
        """RunError unless what was read is in `written` with the same values, and nothing else."""
        changed = sorted(self._seen.keys() ^ written.specs.keys()) or [
            name for name, (spec, digest) in self._seen.items()
            if written.specs[name] != spec or _digest(written, name, written.read(name)) != digest
        ]  # fmt: skip
        if changed:
            raise RunError(
                f"--output: {output}: {len(changed)} tensors read back differently from what was written ({changed[0]} first);"
                " the disk or the format's table is at fault"
            )


def _digest(weights: Weights, name: str, tensor: torch.Tensor) -> bytes:
    return hashlib.blake2b(bytes_of(tensor, weights.specs[name], name), digest_size=16).digest()
