"""What a weight format implements: an entry point of `rlcore.weight_formats`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from rlcore.errors import ConfigError
from rlcore.weights.account import accounted, below, prefix_of
from rlcore.weights.architecture import Architecture, architecture
from rlcore.weights.lora import Adapter, merged, separated
from rlcore.weights.output import Draft
from rlcore.weights.tensors import Weights

Word = str | Callable[[Any], Mapping[str, Any]]  # our name of an argument, or what a value of it means in our names


@dataclass(frozen=True)
class Command:
    """A command of another system's converter: the formats between which it converts, and its arguments in our names."""

    source: str
    target: str
    words: Mapping[str, Word]


def nothing(_: Any) -> Mapping[str, Any]:
    """The meaning of an argument that is not needed here."""
    return {}


@dataclass(frozen=True)
class Content:
    """A model between two formats."""

    weights: Weights  # complete, by the hub's names; an adapter is merged into them
    model: Architecture
    adapter: Adapter | None = None
    untied: bool = False  # the head differs from the embedding, though the base model's config ties them


class WeightFormat(Protocol):
    """A format that can be read. Keyword-only parameters of `read` and `write` are its options, `from.x` and `to.x`."""

    words: ClassVar[Mapping[str, Word]]  # arguments of the system's own converter -> ours (input, output, base, from.x, to.x)

    def read(self, source: Path, base: Path | None) -> Content: ...  # **options


class WritableFormat(WeightFormat, Protocol):
    """A format that can be written too."""

    def write(self, content: Content, draft: Draft) -> Weights: ...  # **options; what was written, read back by the hub's names


class SplitFormat(WritableFormat, Protocol):
    """A format in files of parallel ranks, which can be split for others without the base model."""

    def whole(self, source: Path) -> Weights: ...  # **options of `read`; under the format's own names

    def split(self, whole: Weights, draft: Draft) -> Weights: ...  # **options; what was written, read back by the same names


def content_of(source: Weights, base: Path | None, where: Path) -> Content:
    """Account for all tensors of a checkpoint; ConfigError without a base model, and for tensors that do not fit it."""
    model = architecture(required(base, where))
    complete = accounted(source, model, str(where))
    return Content(complete.weights, model, untied=complete.untied)


def trained_content(source: Weights, base: Path | None, where: Path, adapter: Callable[[Weights], Adapter]) -> Content:
    """`content_of` a training checkpoint: the model below a prefix, other states beside it, possibly wrapped by peft. `adapter`
    makes an adapter of its low-rank factors, which is merged."""
    model = architecture(required(base, where))
    plain, factors = separated(source)
    prefix = prefix_of(plain, model)
    plain, factors = below(plain, prefix), below(factors, prefix)
    complete = accounted(plain, model, str(where))
    if not factors.specs:
        return Content(complete.weights, model, untied=complete.untied)
    lora = adapter(factors)
    return Content(merged(complete.weights, lora, model, str(where)), model, lora, complete.untied)


def required(base: Path | None, where: Path) -> Path:
    if base is None:
        raise ConfigError(f"--base: {where} has no config and tokenizer of its own; give the base model's Hugging Face folder")
    return base
