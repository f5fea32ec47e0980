"""`rlcore dpo`: preference pairs through the same packed actor; both responses share their prompt's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rlcore.checkpoint.folder import latest_checkpoint
from rlcore.config.schema import RunConfig
from rlcore.data.prompts import left_out
from rlcore.device import Backend
from rlcore.errors import ConfigError
from rlcore.model.resolved import ResolvedModel
from rlcore.monitor.console import Console
from rlcore.protocols import ModelFamily
from rlcore.runtime.placement import start
from rlcore.runtime.signals import Interruption
from rlcore.runtime.watchdog import Watchdog
from rlcore.train.loop import Loop, Task
from rlcore.train.sft import checked, response_length, written
from rlcore.types import Batch, Group, Prompt, Row


def train(
    config: RunConfig, backend: Backend, folder: Path, resume: bool, console: Console, begin: Callable[[], object]
) -> None:
    """The `dpo` section as a run. `begin` is called before anything is written."""
    if config.dpo is None:
        raise ConfigError("dpo: must be set for training on preferences (steps, pairs_per_step, beta)")
    with Interruption() as interruption, Watchdog(config.placement.stall_seconds, folder) as watchdog:
        saved = latest_checkpoint(folder) if resume else None
        resolved, source = checked(config, backend, check_pairs)
        with start(resolved, watchdog) as placement:
            placement.load("dpo")
            begin()
            console.say(resolved.notice)
            console.warn(resolved.caution)
            console.warn(left_out("data.train", source, config.data))
            count, reference, encoder = config.dpo.pairs_per_step, placement.reference, placement.encoder
            assert reference is not None

            def batch() -> Batch:
                prompts = source.draw(count)
                pairs = Batch.of(preferences(encoder.embed(prompts) if encoder else prompts, resolved.family))
                return replace(pairs, ref_logprobs=reference.logprobs(pairs))

            task = Task("dpo", config.dpo.steps, config.dpo.log_every, batch, ("dpo/loss", "dpo/accuracy", "dpo/margin"))
            Loop(task, placement.actor, source, config, folder, console, interruption).go(saved)


def check_pairs(rows: Sequence[Row], resolved: ResolvedModel) -> None:
    """ConfigError names the first row without a preferred or a rejected response, with one that no model would write, with
    equal ones, or too long for one pass."""
    family, cap = resolved.family, resolved.config.train.max_tokens_per_microbatch
    for row in rows:
        for name, text in (("preferred", row.target), ("rejected", row.rejected)):
            if not text or not text.strip():
                raise ConfigError(f"{row.id}: no {name} response; name the columns in data.train.options (target, rejected)")
        if row.target == row.rejected:
            raise ConfigError(f"{row.id}: the preferred and the rejected response are the same; remove the row")
        named = (("preferred response", row.target), ("rejected response", row.rejected))
        needed = family.prompt_length(row) + sum(response_length(row, text, name, family) - 1 for name, text in named)
        if needed > cap:
            raise ConfigError(
                f"{row.id}: prompt and both responses need {needed} tokens in one forward pass, more than"
                f" train.max_tokens_per_microbatch {cap}; raise that limit or remove the row"
            )


def preferences(prompts: Sequence[Prompt], family: ModelFamily) -> list[Group]:
    """Each prompt with its row's preferred and rejected response."""
    return [
        Group(prompt, [written(text, family) for text in (prompt.row.target or "", prompt.row.rejected or "")])
        for prompt in prompts
    ]

