"""Supervised fine-tuning of the actor on the rows' targets: the warm start of a GRPO run, or `rlcore sft` by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rlcore.checkpoint.folder import latest_checkpoint, newest_checkpoint, read_state
from rlcore.config.schema import RunConfig
from rlcore.data.chat import check_opening
from rlcore.data.prompts import PromptSource
from rlcore.device import Backend
from rlcore.errors import ConfigError
from rlcore.model.resolved import ResolvedModel
from rlcore.monitor.console import Console
from rlcore.protocols import ModelFamily
from rlcore.train.loop import Loop
from rlcore.train.session import Session
from rlcore.train.supervised import SupervisedTask, run
from rlcore.types import Batch, Group, Prompt, Row, Sample


def train(
    config: RunConfig, backend: Backend, folder: Path, resume: bool, console: Console, begin: Callable[[], object]
) -> None:
    """`rlcore sft`: run the `sft` section by itself. `begin` is called before anything is written."""
    if config.sft is None:
        raise ConfigError("sft: must be set for supervised training (steps, rows_per_step, optimizer)")
    run("sft", check_targets, imitation, config, backend, folder, resume, console, begin)


def warm_up(session: Session, folder: Path) -> None:
    """Run the warm start of a GRPO run in `folder`, resuming from the newest checkpoint there."""
    source = session.resolved.prompts(session.config.seed)
    Loop(imitation(session, source), session, folder).go(newest_checkpoint(folder))


def missing(folder: Path | None, steps: int) -> bool:
    """Whether a warm start of `steps` is requested and unfinished: it runs once per run, then is read from its folder."""
    saved = newest_checkpoint(folder) if folder else None
    return folder is not None and (saved is None or read_state(saved)["step"] < steps)


def result(folder: Path | None) -> Path | None:
    """Model folder of a finished warm start: the run's initial policy and reference."""
    return None if folder is None else latest_checkpoint(folder) / "model"


def check_targets(rows: Sequence[Row], resolved: ResolvedModel) -> None:
    """Raise ConfigError for the first row whose target is missing, one that no model would write (`response_length`), or
    too long for one forward pass."""
    family, cap = resolved.family, resolved.config.train.max_tokens_per_microbatch
    for row in rows:
        if not row.target or not row.target.strip():
            raise ConfigError(f"{row.id}: no target to imitate; name the target column in data.train.options or remove sft")
        tokens = family.prompt_length(row) + response_length(row, row.target, "target", family) - 1
        if tokens > cap:
            raise ConfigError(
                f"{row.id}: prompt and target need {tokens} tokens, more than train.max_tokens_per_microbatch {cap};"
                " raise that limit or remove the row"
            )


def response_length(row: Row, text: str, what: str, family: ModelFamily) -> int:
    """Count the tokens of a response to imitate; ConfigError if it repeats what the chat template writes before it, or goes on
    after the end of its turn."""
    check_opening(family.opening(row), text, row.id, what)
    token_ids = family.encode_response(text)
    if ends := family.stop_token_ids.intersection(token_ids[:-1]):
        raise ConfigError(
            f"{row.id}: the {what} holds token {min(ends)}, which ends a response, before its end, where it is added; remove it"
            " from the data"
        )
    return len(token_ids)


def imitation(session: Session, source: PromptSource | None = None) -> SupervisedTask:
    """SFT task: minimize the mean negative log-probability of the target tokens."""
    source = session.source if source is None else source
    config, encoder, family = session.config.sft, session.placement.encoder, session.resolved.family
    assert config is not None

    def batch() -> Batch:
        prompts = source.draw(config.rows_per_step)
        return Batch.of(targets(encoder.embed(prompts) if encoder else prompts, family))

    return SupervisedTask("sft", config.steps, config.log_every, source, batch, ("sft/loss",), session)


def targets(prompts: Sequence[Prompt], family: ModelFamily) -> list[Group]:
    """Pair each prompt with its row's target as the only sample."""
    return [Group(prompt, [_target(prompt, family)]) for prompt in prompts]


def _target(prompt: Prompt, family: ModelFamily) -> Sample:
    assert prompt.row.target, "check_targets comes first"
    return written(prompt.row.target, family)


def written(text: str, family: ModelFamily) -> Sample:
    """Encode a response from the data as a sample, with rollout log-probabilities of 0."""
    token_ids = np.array(family.encode_response(text), np.int32)
    return Sample(token_ids, np.zeros(len(token_ids), np.float32), text, "stop", policy_version=0)
