"""The data sets of a run file: the stream of training prompts, and the held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rlcore.config.sections import DataConfig
from rlcore.data.prompts import CHECKED_ROWS, Encoded, PromptSource, RowFilter, TrainingSet, no_check
from rlcore.data.rows import load_rows
from rlcore.errors import ConfigError
from rlcore.types import Prompt, Row

if TYPE_CHECKING:
    from rlcore.protocols import ModelFamily

Check = Callable[[Row], None]


def training_prompts(
    config: DataConfig, family: ModelFamily, seed: int, check: Check = no_check, conversations: bool = False
) -> PromptSource:
    """The training rows, shuffled by `seed`, as prompts or as whole `conversations` to imitate. Small data sets are read and
    checked now, large ones as they are drawn (data.check)."""
    if not config.train:
        raise ConfigError("data.train: must be set: the rows to train on")
    mixed = len(config.train) > 1
    loaded = [
        load_rows(one, key, config.system, f"{one.source or one.name}/" if mixed else "")
        for key, one in config.training_sets.items()
    ]
    rows = RowFilter(family, config.max_prompt_tokens, config.long_prompts, check)
    encode = family.encode_conversation if conversations else lambda row: [family.encode(row)]
    weights = [one.weight for one in config.train]
    if reads_all(config, sum(map(len, loaded))):
        kept = [rows.fitting(one, one.key) for one in loaded]
        sets = [TrainingSet(one, weight, one.dropped_long) for one, weight in zip(kept, weights, strict=True)]
        return PromptSource(sets, encode, seed)
    sets = [TrainingSet(one, weight) for one, weight in zip(loaded, weights, strict=True)]
    return PromptSource(sets, encode, seed, rows.fits)


def held_out_prompts(config: DataConfig, family: ModelFamily, check: Check = no_check) -> dict[str, Encoded[Prompt]]:
    """Every held-out row that fits, in order, by the name of its set."""
    rows = RowFilter(family, config.max_prompt_tokens, config.long_prompts, check)
    named = zip(config.eval, config.held_out_sets.items(), strict=True)
    kept = {name: rows.fitting(load_rows(one, key, config.system), key) for name, (key, one) in named}
    return {name: Encoded(one, family.encode, dropped_long=one.dropped_long) for name, one in kept.items()}


def reads_all(config: DataConfig, rows: int) -> bool:
    """Whether every training row is read before the run."""
    return config.check == "all" or (config.check == "auto" and rows <= CHECKED_ROWS)
