"""`rlcore grpo`: one iteration (`step`), and the state carried between iterations (`GrpoTask`)."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from rlcore.algorithms.kl import Controller
from rlcore.checkpoint.folder import latest_checkpoint, newest_checkpoint
from rlcore.config.schema import RunConfig
from rlcore.data.prompts import Encoded
from rlcore.device import Backend
from rlcore.errors import ConfigError
from rlcore.model.resolved import ResolvedModel
from rlcore.monitor import metrics
from rlcore.monitor.clock import OUTSIDE_ITERATION, Clock, Span, timings
from rlcore.monitor.console import Console, grpo_line
from rlcore.protocols import Reward
from rlcore.rewards.runner import RewardFunctions
from rlcore.runtime.placement import Placement
from rlcore.runtime.roles import InlineReward, Scorer
from rlcore.runtime.signals import Interruption
from rlcore.train import pending, sft
from rlcore.train.advantages import advantage_inputs, needs_old_logprobs, with_advantages
from rlcore.train.evaluate import evaluate
from rlcore.train.loop import Loop, NothingToLearn
from rlcore.train.records import Iteration, failures, sample_records, score_metrics, source_metrics
from rlcore.train.results import Evaluation
from rlcore.train.sampling import STAGES, Sampled, Sampler, synced
from rlcore.train.session import Session
from rlcore.types import Batch, Metrics, Prompt, Row

T = TypeVar("T")


def step(sample: Sampler, number: int, kl_coef: float, interruption: Interruption) -> Iteration:
    """Sync weights, sample, score, compute log-probabilities, update. A broken weight path fails before any training."""
    sampled = sample(number, synced(sample.placement, sample.clock))
    return learn(sample.placement, sampled, sample.config, kl_coef, sample.clock, interruption)


def learn(
    placement: Placement, sampled: Sampled, config: RunConfig, kl_coef: float, clock: Clock,
    interruption: Interruption,
) -> Iteration:
    """Compute reference and old log-probabilities, values and advantages, then update."""
    kept = sampled.kept
    batch = replace(Batch.of(kept.groups), kl_coef=kl_coef)
    compared = compared_with(placement, batch)
    if needs_old_logprobs(config):
        batch = replace(batch, old_logprobs=placement.actor.logprobs(batch))
    if placement.critic is not None:
        batch = replace(batch, values=placement.critic.values(batch))
    if compared is not None:
        batch = replace(batch, ref_logprobs=compared.result())
    with clock.span("adv"):
        inputs = advantage_inputs(batch, kept.scores, config)
        batch = with_advantages(batch, inputs, config.algorithm)
    interruption.hold()
    update = placement.update(batch)
    if batch.ref_logprobs is not None and config.algorithm.kl_in == "reward":
        update["actor/kl_penalty"] = float(inputs.penalties.mean()) / kl_coef  # the controller keeps kl_coef above 0
    return Iteration(batch, kept.scores, inputs, sampled.replaced, sampled.receipt, update)


def compared_with(placement: Placement, batch: Batch) -> Future[Tensor] | None:
    """The reference's log-probabilities, or None without one; on devices of its own it runs concurrently with the actor."""
    reference = placement.reference
    if reference is None:
        return None
    return begun(lambda: reference.logprobs(batch), "reference", placement.compares_elsewhere)


def begun(work: Callable[[], T], name: str, apart: bool = True) -> Future[T]:
    """Run `work` in a thread if `apart`, otherwise now; returns a Future."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    if apart:
        threading.Thread(target=run, name=name, daemon=True).start()
    else:
        future.set_result(work())
    return future


def train(
    config: RunConfig, backend: Backend, folder: Path, resume: bool, console: Console, begin: Callable[[], object]
) -> None:
    """Run warm start, evaluation, steps and checkpoints. An interrupt saves the last finished step and exits.

    `begin` is called when everything has loaded and before anything is written: a run that cannot start leaves no trace.
    """
    if not config.reward:
        raise ConfigError("reward: must list at least one reward, for example [{name: math}]")
    warm = folder / "sft" if config.sft else None
    saved = _resumed(folder, warm, console.warn) if resume else None
    with Session(config, backend, folder, console) as session:
        rewards = RewardFunctions(config.reward)
        session.read(partial(_check, rewards=rewards, resolved=session.resolved))
        held_out = session.held_out(rewards.check)
        placement = session.start()
        warm_steps = sft.steps(config.sft, session.source) if config.sft else 0
        first = saved is None and sft.missing(warm, warm_steps)
        if first:
            placement.load("sft", steps=warm_steps)
        else:
            placement.load("grpo", sft.result(warm))
        placement.start_engines()
        session.announce(begin)
        if first and warm:
            sft.warm_up(session, warm)
            placement.load("grpo", sft.result(warm))
        task = GrpoTask(session, rewards, held_out)
        Loop(task, session, folder, config.evaluation).go(saved)


def _check(row: Row, rewards: RewardFunctions, resolved: ResolvedModel) -> None:
    rewards.check(row)
    if resolved.config.sft:
        sft.check_target(row, resolved)


class GrpoTask:
    """GRPO training task, and its state between steps."""

    name, log_every = "grpo", 1

    def __init__(self, session: Session, rewards: Reward, held_out: Mapping[str, Encoded[Prompt]]) -> None:
        self.config, self.source, self.placement = session.config, session.source, session.placement
        self.interruption, self.held_out = session.interruption, held_out
        self.steps = self.config.train.steps
        self.clock = Clock(session.watchdog.heartbeat)
        self.reward: Scorer = self.placement.reward or InlineReward(rewards, self.clock)
        self.kl = Controller(self.config.algorithm, self.config.algorithm.kl_coef)
        self.sample = Sampler(self.placement, self.reward, self.source, self.config, self.clock)
        self.dropped_long = self.source.dropped_long  # prompts that were too long, after the last finished step
        self.sampling: dict[int, Future[Sampled]] = {}  # this step's samples, and the next one's if they are drawn ahead
        self.ahead_since = math.inf  # when sampling ahead started
        self.spans: list[Span] = []  # recorded while sampling ahead

    def start(self) -> None:
        self.recorded()
        self.placement.traffic()

    def step(self, number: int) -> GrpoStep:
        began = time.perf_counter()
        sampled = self._sampled(number)
        _refuse_unscored(number, sampled)
        iteration = learn(self.placement, sampled, self.config, self.kl.coefficient, self.clock, self.interruption)
        apart = iteration.update.get("actor/kl_loss", iteration.update.get("actor/kl_penalty"))
        if apart is not None:
            self.kl.observe(apart, len(iteration.batch.samples))
        self.dropped_long = sampled.dropped_long
        return GrpoStep(self, number, iteration, sampled.drawn, began)

    def evaluate(self) -> Evaluation:
        """Evaluate, once any sampling ahead has finished."""
        wait(self.sampling.values())
        with self.clock.span("evaluate"):
            self.placement.sync_weights()
            return Evaluation(evaluate(self.placement, self.reward, self.held_out, self.config))

    def state(self) -> dict[str, Any]:
        return {"kl_coef": self.kl.coefficient, "dropped_long": self.dropped_long}

    def files(self, done: int, patient: bool) -> dict[str, bytes]:
        """The samples that the step after `done` trains, if they are drawn ahead and, unless `patient`, have come."""
        sampled = self.sampling.get(done + 1)
        if sampled is None or not (patient or sampled.done()) or sampled.exception() is not None:
            return {}
        return {pending.FILE: pending.packed(sampled.result())}

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        self.placement.version = done = state["step"]
        self.dropped_long = self.source.dropped_long = state["dropped_long"]
        self.kl = Controller(self.config.algorithm, state["kl_coef"])
        if (path := folder / pending.FILE).exists():
            sampled = pending.unpacked(path, self.sample.draw)
            self.source.drawn, self.source.dropped_long = sampled.drawn, sampled.dropped_long
            self.sampling[done + 1] = begun(lambda: sampled, path.name, apart=False)

    def recorded(self) -> list[Span]:
        """Spans of every process since the last call."""
        return [*self.clock.take(), *self.placement.spans()]

    def timing(self, began: float) -> Metrics:
        """Timing metrics of a step, including its own sampling, even if that ran during the step before."""
        spans = [*self.spans, *self.recorded()]
        outside = [span for span in spans if span.stage in OUTSIDE_ITERATION]
        spans = [span for span in spans if span in outside or not _part_of(outside, span)]
        parts: dict[bool, list[Span]] = {True: [], False: []}
        for span in spans:
            ahead = span.stage in STAGES and span.start >= self.ahead_since
            parts[ahead].append(span)
        self.spans = parts[True]
        return timings(parts[False], began, time.perf_counter(), beside=self.spans)

    def _sampled(self, number: int) -> Sampled:
        """This step's samples; with max_staleness 1, sampling of the next step starts as well."""
        if not self.config.placement.max_staleness:
            return self.sample(number, synced(self.placement, self.clock))
        self.sampling = {number: self.sampling.get(number) or self._begun(number)}
        sampled = self.sampling[number].result()
        self.ahead_since = math.inf
        if number < self.steps:
            self.ahead_since = time.perf_counter()
            self.sampling[number + 1] = self._begun(number + 1)
        return sampled

    def _begun(self, number: int) -> Future[Sampled]:
        """Sync weights while no sampling runs, then sample in a thread."""
        receipt = synced(self.placement, self.clock)
        return begun(lambda: self.sample(number, receipt), f"sampling of step {number}")


@dataclass(frozen=True)
class GrpoStep:
    """A finished iteration, with its metrics, sample records and console output."""

    task: GrpoTask
    number: int
    iteration: Iteration
    drawn: int
    began: float

    def metrics(self) -> Metrics:
        task, iteration, config = self.task, self.iteration, self.task.config
        batch, inputs = iteration.batch, iteration.inputs
        assert batch.advantages is not None, "`learn` has set them"
        timing = task.timing(self.began)
        sampled = [*batch.groups, *iteration.replaced.groups]
        return {
            **score_metrics([*iteration.scores, *iteration.replaced.scores]),
            **source_metrics(sampled, [*iteration.scores, *iteration.replaced.scores]),
            **metrics.spread("grpo/rewards", inputs.penalized[inputs.valid].tolist()),
            **metrics.spread("grpo/advantages", batch.sample_values(batch.advantages)),
            **{"grpo/lr" if name == "lr" else name: value for name, value in iteration.update.items()},
            **metrics.lengths(sampled),
            "data/dropped_long": float(task.dropped_long),
            **({"data/replaced_groups": float(len(iteration.replaced.groups))} if config.algorithm.max_refills else {}),
            **({"grpo/kl_coef": batch.kl_coef} if config.algorithm.kl_target else {}),
            **(metrics.images(sampled) if task.placement.encoder else {}),
            **metrics.sync(iteration.receipt),
            **self._staleness(),
            **task.placement.memory(),
            **task.placement.traffic(),
            **timing,
            **metrics.throughput(sampled, timing, devices=task.placement.devices),
        }

    def records(self) -> Iterator[dict[str, Any]]:
        return sample_records(self.iteration, self.task.config.algorithm)

    def line(self, numbers: Metrics) -> str:
        return grpo_line(self.number, self.task.steps, numbers)

    def show(self, numbers: Metrics, console: Console) -> None:
        console.show(self.iteration.batch.groups, self.iteration.scores)
        limit = self.task.config.rollout.max_mismatch
        if numbers.get("mismatch/mean", 0.0) > limit:
            console.warn(
                f"the engine's log-probabilities differ from the actor's by {numbers['mismatch/mean']:.3f} on average,"
                f" more than rollout.max_mismatch {limit}; likely causes: a low rollout.top_p or top_k, or another precision in"
                " the engine"
            )
        console.warn(failures([*self.iteration.scores, *self.iteration.replaced.scores]))

    def _staleness(self) -> Metrics:
        if not self.task.config.placement.max_staleness:
            return {}
        trained = self.task.placement.version - 1
        return {"data/staleness": float(max(trained - sample.policy_version for sample in self.iteration.batch.samples))}


def _refuse_unscored(number: int, sampled: Sampled) -> None:
    """Raise NothingToLearn if every reward of the step failed: the next step's would fail too, so the run stops here."""
    scores = [score for group in [*sampled.kept.scores, *sampled.replaced.scores] for score in group]
    if all(score.value is None for score in scores):
        raise NothingToLearn(
            f"step {number}: the reward of each of its {len(scores)} samples failed; the first: {scores[0].detail}; mend the"
            " reward or the rows, then go on with --resume or start again"
        )


def _part_of(outside: Sequence[Span], span: Span) -> bool:
    """Whether the span belongs to an evaluation or a checkpoint save. Sampling during a save is for the next step; during an
    evaluation, no step is sampled."""
    middle = (span.start + span.end) / 2
    within = [one.stage for one in outside if one.start <= middle <= one.end]
    return "evaluate" in within or (bool(within) and span.stage not in STAGES)


def _resumed(folder: Path, warm: Path | None, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from; None if the run is still in its warm start."""
    if warm is not None and newest_checkpoint(warm) and not newest_checkpoint(folder):
        return None
    return latest_checkpoint(folder, warn)
