"""Evaluation on held-out rows: every row once, each set under its own sampling settings; and `rlcore eval`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rlcore.checkpoint.folder import read_state
from rlcore.config.loader import validate
from rlcore.config.schema import RunConfig
from rlcore.config.sections import EvaluationConfig
from rlcore.data.prompts import Encoded
from rlcore.device import Backend
from rlcore.errors import ConfigError
from rlcore.monitor.clock import Clock
from rlcore.monitor.console import Console, evaluation_table
from rlcore.monitor.sinks import Sinks
from rlcore.rewards.runner import RewardFunctions
from rlcore.runtime.placement import Placement
from rlcore.runtime.roles import InlineReward, Scorer
from rlcore.train.records import evaluation_records, failures
from rlcore.train.results import Evaluation, SetResult
from rlcore.train.sampling import Scored, sampling, scored_in_order
from rlcore.train.session import Session
from rlcore.types import Group, Prompt

EVALUATION_SEED = 1 << 31  # far from every step's seed; CPU generators read the lower 32 bits only
_PORTION_BYTES = 2 * 2**30  # of images in memory at a time


def run(
    config: RunConfig, backend: Backend, folder: Path, resume: bool, console: Console, begin: Callable[[], object]
) -> None:
    """`rlcore eval`: sample and score the held-out rows with the weights that the engines start with. `begin` is called before
    anything is written."""
    config = evaluating(config)
    if not config.reward:
        raise ConfigError("reward: must list at least one reward, by which responses are scored")
    with Session(config, backend, folder, console) as session:
        rewards = RewardFunctions(config.reward)
        held_out = session.held_out(rewards.check)
        placement = session.start()
        placement.load_encoder()
        placement.start_engines()
        session.announce(begin)
        clock, began = Clock(session.watchdog.heartbeat), time.perf_counter()
        with clock.span("evaluate"):
            scorer = placement.reward or InlineReward(rewards, clock)
            evaluation = Evaluation(evaluate(placement, scorer, held_out, config))
        step, took = step_of(session.resolved.folder), {"timing/evaluate": time.perf_counter() - began}
        sinks = Sinks(folder, config.logging.tensorboard)
        try:
            sinks.write(step, evaluation.metrics() | took, evaluation_records(evaluation), evaluation.report(step))
        finally:
            sinks.close()
        console.say(evaluation_table(evaluation.report(step)))
        console.warn(failures(evaluation.scores))


def evaluating(config: RunConfig) -> RunConfig:
    """The settings with an evaluation section, by default that of `evaluation: {}`; ConfigError without held-out rows."""
    if not config.data.eval:
        raise ConfigError("data.eval: must be set: the rows to evaluate on")
    return config if config.evaluation else validate(RunConfig, {**config.model_dump(), "evaluation": {}})


def step_of(model: Path) -> int:
    """Number of steps after which a run saved this model folder; 0 for any other model."""
    saved = model.name == "model" and (model.parent / "state.json").is_file()
    return read_state(model.parent)["step"] if saved else 0


def evaluate(
    placement: Placement, reward: Scorer, held_out: Mapping[str, Encoded[Prompt]], config: RunConfig
) -> list[SetResult]:
    """Sample and score every row of every held-out set once. The engines serve the weights they have."""
    results = []
    for name, settings in config.evaluation_sets.items():
        scored = _scored(placement, reward, held_out[name], settings, EVALUATION_SEED + config.seed)
        results.append(SetResult(name, settings, scored.groups, scored.scores, held_out[name].dropped_long))
    return results


def _scored(
    placement: Placement, reward: Scorer, prompts: Sequence[Prompt], settings: EvaluationConfig, seed: int
) -> Scored:
    """Groups and scores in the order of the prompts, without images: a portion at a time has them in memory."""
    scored = Scored([], [])
    for portion in portions(prompts, _PORTION_BYTES):
        portion = placement.encoder.embed(portion) if placement.encoder else portion
        parameters = replace(sampling(settings, settings.samples, seed), first=len(scored.groups))
        part = scored_in_order(placement.rollout.stream(portion, parameters), reward)
        scored += Scored([Group(group.prompt.for_rewards(), group.samples) for group in part.groups], part.scores)
    return scored


def portions(prompts: Sequence[Prompt], limit: int) -> Iterator[list[Prompt]]:
    """Yield consecutive prompts, all in one list where their images fit into `limit` bytes, else in several."""
    portion: list[Prompt] = []
    held = 0
    for prompt in prompts:
        size = sum(tensor.nbytes for tensor in (prompt.vision or {}).values())
        if portion and held + size > limit:
            yield portion
            portion, held = [], 0
        portion.append(prompt)
        held += size
    if portion:
        yield portion
