"""What of a run file may change when its run is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlcore.config.schema import RunConfig
from rlcore.errors import ConfigError

Changes = dict[str, tuple[Any, Any]]  # by setting: recorded, now

_FREE = (
    "train.steps", "train.save_every", "train.keep_last", "train.keep_best", "train.max_tokens_per_microbatch",
    "train.gradient_checkpointing", "sft.steps", "sft.epochs", "dpo.steps", "placement", "sharding", "backend", "logging",
    "evaluation", "data.eval", "data.check", "rollout.options", "rollout.tensor_parallel", "rollout.max_mismatch",
    "vision.images_per_batch",
)  # fmt: skip
"""How long the run is, where and how fast it runs, and what is measured and kept."""
_MEANS = ("placement.max_staleness",)
_FIXED = ("model.lora",)
"""Without which the checkpoint cannot be read."""


def changes(recorded: RunConfig, now: RunConfig) -> Changes:
    """The settings that differ."""
    before, after = (dict(_flat(config.model_dump(mode="json"))) for config in (recorded, now))
    names = dict.fromkeys([*before, *after])
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def refuse(found: Changes, anyway: bool) -> None:
    """ConfigError for changes that make another run of it, unless the user wants them `anyway`, and for impossible ones."""
    fixed = {name: values for name, values in found.items() if _below(name, _FIXED)}
    if fixed:
        raise ConfigError(f"--resume: the checkpoints are of another model: {_told(fixed)}; start a new run (model.path)")
    meant = {name: values for name, values in found.items() if not free(name)}
    if meant and not anyway:
        raise ConfigError(
            f"--resume: this would be another run: {_told(meant)}; undo the change, or give --resume-anyway to go on with it"
        )


def free(name: str) -> bool:
    """Whether the setting changes no sample and no update but by rounding."""
    return _below(name, _FREE) and not _below(name, _MEANS)


def _below(name: str, sections: tuple[str, ...]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def _told(found: Changes) -> str:
    return ", ".join(f"{name} was {before!r} and is {after!r}" for name, (before, after) in found.items())


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    entries = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else None
    if entries is None:
        yield prefix.removesuffix("."), values
        return
    for name, value in entries:
        yield from _flat(value, f"{prefix}{name}.")
