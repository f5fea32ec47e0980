"""`rlcore dpo`: train the packed actor on preference pairs; both responses share their prompt's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rlcore.checkpoint.folder import latest_checkpoint
from rlcore.config.schema import RunConfig
from rlcore.device import Backend
from rlcore.errors import ConfigError
from rlcore.model.resolved import ResolvedModel
from rlcore.monitor.clock import Clock
from rlcore.monitor.console import Console
from rlcore.protocols import ModelFamily
from rlcore.train.loop import Loop
from rlcore.train.session import Session
from rlcore.train.sft import response_length, written
from rlcore.train.supervised import SupervisedTask
from rlcore.types import Batch, Group, Prompt, Row


def train(
    config: RunConfig, backend: Backend, folder: Path, resume: bool, console: Console, begin: Callable[[], object]
) -> None:
    """Run the `dpo` section. `begin` is called before anything is written."""
    if config.dpo is None:
        raise ConfigError("dpo: must be set for training on preferences (steps, pairs_per_step, beta)")
    saved = latest_checkpoint(folder, console.warn) if resume else None
    with Session(config, backend, folder, console) as session:
        session.read(partial(check_pair, resolved=session.resolved))
        session.start().load("dpo")
        session.announce(begin)
        Loop(comparison(session), session, folder).go(saved)


def comparison(session: Session) -> SupervisedTask:
    """DPO task: raise each preferred response's log-probability above the rejected one's, relative to the reference."""
    config, source, family = session.config.dpo, session.source, session.resolved.family
    reference, encoder = session.placement.reference, session.placement.encoder
    assert config is not None and reference is not None

    def batch() -> Batch:
        prompts = source.draw(config.pairs_per_step)
        pairs = Batch.of(preferences(encoder.embed(prompts) if encoder else prompts, family))
        return replace(pairs, ref_logprobs=reference.logprobs(pairs))

    shown = ("dpo/loss", "dpo/accuracy", "dpo/margin")
    clock = Clock(session.watchdog.heartbeat)
    return SupervisedTask("dpo", config.steps, config.log_every, source, batch, shown, session, clock)


def check_pair(row: Row, resolved: ResolvedModel) -> None:
    """Raise ConfigError for a row whose preferred or rejected response is missing or one that no model would write
    (`response_length`), whose two responses are equal, or which is too long for one forward pass."""
    family, cap = resolved.family, resolved.config.train.max_tokens_per_microbatch
    preferred, rejected = _given(row, "preferred", row.target), _given(row, "rejected", row.rejected)
    if row.target == row.rejected:
        raise ConfigError(f"{row.id}: the preferred and the rejected response are the same; remove the row")
    named = (("preferred response", preferred), ("rejected response", rejected))
    needed = family.prompt_length(row) + sum(response_length(row, text, name, family) - 1 for name, text in named)
    if needed > cap:
        raise ConfigError(
            f"{row.id}: prompt and both responses need {needed} tokens in one forward pass, more than"
            f" train.max_tokens_per_microbatch {cap}; raise that limit or remove the row"
        )


def _given(row: Row, name: str, text: str | None) -> str:
    if not text or not text.strip():
        raise ConfigError(f"{row.id}: no {name} response; name the columns in data.train.options (target, rejected)")
    return text


def preferences(prompts: Sequence[Prompt], family: ModelFamily) -> list[Group]:
    """Pair each prompt with its row's preferred and rejected response, in that order."""
    return [
        Group(prompt, [written(text, family) for text in (prompt.row.target or "", prompt.row.rejected or "")])
        for prompt in prompts
    ]

