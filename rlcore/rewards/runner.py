"""Run the reward functions of a run file over groups. A failure is a status with its reason, never a silent 0."""

from __future__ import annotations

import inspect
import math
from bdb import BdbQuit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

from rlcore import registry
from rlcore.config.sections import EVERY, RewardConfig
from rlcore.errors import ConfigError, nearest
from rlcore.types import Group, Prompt, Row, Sample, Score

RewardFunction = Callable[..., float]  # (response, answer, fields), and prompt=text if it has that parameter


@dataclass(frozen=True)
class Term:
    """One reward function of the weighted sum."""

    name: str
    weight: float
    function: RewardFunction
    wants_prompt: bool = False  # the prompt text as a keyword argument


class RewardFunctions:
    """Weighted sum of the run file's rewards for all rows, or of those for a row's source, in this process. ConfigError for
    unknown names, options and repeats."""

    def __init__(self, configs: Mapping[str, Sequence[RewardConfig]]) -> None:
        self.terms = {
            source: _terms(rewards, f"reward.{source}" if source else "reward") for source, rewards in configs.items()
        }

    def check(self, row: Row) -> None:
        """ConfigError for a row from a source that has no reward."""
        if EVERY not in self.terms and row.source not in self.terms:
            hint = nearest(row.source, list(self.terms))
            raise ConfigError(f"reward: the row {row.id} is from {row.source!r}, which has no reward in the table{hint}")

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        """One score per sample, in order. Status "timeout" where a function raised TimeoutError, "error" for all else."""
        return [[self._score(sample, group.prompt) for sample in group.samples] for group in groups]

    def _score(self, sample: Sample, prompt: Prompt) -> Score:
        row, parts = prompt.row, dict[str, float]()
        terms = self.terms[EVERY if EVERY in self.terms else row.source]
        for term in terms:
            given = {"prompt": prompt.text} if term.wants_prompt else {}
            try:
                parts[term.name] = _number(term.function(sample.text, row.answer, row.fields, **given))
            except BdbQuit:  # the user quit the debugger inside a reward
                raise
            except Exception as error:
                status = "timeout" if isinstance(error, TimeoutError) else "error"
                detail = f"reward {term.name!r}, row {row.id}: {type(error).__name__}: {error}"
                return Score(None, status, parts, detail)
        return Score(sum(term.weight * parts[term.name] for term in terms), parts=parts)


def _terms(configs: Sequence[RewardConfig], key: str) -> list[Term]:
    names = [config.name for config in configs]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(f"{key}.{index}.name: {name!r} is already {key}.{names.index(name)}; list each reward once")
    return [_term(config, f"{key}.{index}") for index, config in enumerate(configs)]


def _term(config: RewardConfig, key: str) -> Term:
    dotted = "." in config.name
    function = registry.load_dotted(config.name, f"{key}.name") if dotted else registry.load("rewards", config.name)
    _check_shape(function, config.name, key)
    options = registry.checked_options(function, config.options, f"{key}.options.", given=3, handed=("prompt",))
    wants_prompt = "prompt" in list(inspect.signature(function).parameters)[3:]
    return Term(config.name, config.weight, partial(function, **options), wants_prompt)


def _check_shape(function: Any, name: str, key: str) -> None:
    if not callable(function):
        raise ConfigError(f"{key}.name: {name!r} is a {type(function).__name__}, not a function")
    try:
        inspect.signature(function).bind_partial("", "", {})
    except TypeError:
        raise ConfigError(f"{key}.name: {name!r} must take (response, answer, fields)") from None


def _number(value: Any) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"it returned {value!r}, not a finite number")
    return float(value)
