"""One GRPO iteration (`step`), and the run around it (`train`)."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from rlcore.algorithms.kl import Controller
from rlcore.checkpoint.folder import latest_checkpoint, newest_checkpoint, read_state, save_checkpoint
from rlcore.checkpoint.state import random_states, restore_random_states, seed_random_states
from rlcore.config.schema import RunConfig
from rlcore.data.prompts import Prompts, PromptSource, left_out
from rlcore.device import Backend
from rlcore.errors import ConfigError, NonFinite, RunError
from rlcore.model.resolved import ResolvedModel
from rlcore.monitor import metrics
from rlcore.monitor.clock import OUTSIDE_ITERATION, Clock, Span, timings
from rlcore.monitor.console import Console, grpo_line
from rlcore.monitor.sinks import Sinks
from rlcore.rewards.runner import RewardFunctions
from rlcore.runtime.placement import Placement, start
from rlcore.runtime.roles import InlineReward, Scorer
from rlcore.runtime.signals import Interruption
from rlcore.runtime.watchdog import Watchdog
from rlcore.train import sft
from rlcore.train.advantages import advantage_inputs, needs_old_logprobs, with_advantages
from rlcore.train.evaluate import Evaluation, _held_out, _unread, evaluate
from rlcore.train.loop import Loop
from rlcore.train.records import Iteration, evaluation_records, failures, sample_records, score_metrics
from rlcore.train.sampling import Sampled, Sampler, synced
from rlcore.types import Batch, Metrics

T = TypeVar("T")
SAMPLING = frozenset({"resharding_to_infer", "data", "image_embeds", "rollout", "reward"})


def step(sample: Sampler, number: int, kl_coef: float, interruption: Interruption) -> Iteration:
    """Sample, score, compare, update. Weights go first: a broken path fails before any training."""
    sampled = sample(number, synced(sample.placement, sample.clock))
    return learn(sample.placement, sampled, sample.config, kl_coef, sample.clock, interruption)


def learn(
    placement: Placement, sampled: Sampled, config: RunConfig, kl_coef: float, clock: Clock,
    interruption: Interruption,
) -> Iteration:
    """Compare and update."""
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
        update["actor/kl_penalty"] = float(inputs.penalties.mean()) / kl_coef  # which a controller keeps above 0
    return Iteration(batch, kept.scores, inputs, sampled.replaced, sampled.receipt, update)


def compared_with(placement: Placement, batch: Batch) -> Future[Tensor] | None:
    """The reference's log-probabilities, if there is one; on devices of its own it works while the actor does."""
    reference = placement.reference
    if reference is None:
        return None
    return begun(lambda: reference.logprobs(batch), "reference", placement.compares_elsewhere)


def begun(work: Callable[[], T], name: str, apart: bool = True) -> Future[T]:
    """`apart`: in a thread of its own; otherwise it is done when this returns."""
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
    """The whole run: warm start, evaluation, steps, checkpoints. An interrupt saves the last finished step and leaves.

    `begin` is called when everything has loaded and before anything is written: a run that cannot start leaves no trace.
    """
    if not config.reward:
        raise ConfigError("reward: must list at least one reward, for example [{name: math}]")
    with Interruption() as interruption, Watchdog(config.placement.stall_seconds, folder) as watchdog:
        warm = folder / "sft" if config.sft else None
        saved = _resumed(folder, warm) if resume else None
        seed_random_states(config.seed)
        resolved = ResolvedModel(config, backend)
        source = resolved.prompts(config.seed)
        held_out = _held_out(resolved)
        if config.sft:
            sft.check_targets(source.rows, resolved)
        rewards = RewardFunctions(config.reward)
        with start(resolved, watchdog) as placement:
            first = config.sft is not None and saved is None and sft.missing(warm, config.sft.steps)
            placement.load("sft" if first else "grpo", None if first else sft.result(warm))
            placement.start_engines()
            begin()
            console.say(resolved.notice)
            console.warn(resolved.caution)
            console.warn(left_out("data.train", source, config.data))
            console.warn(left_out("data.eval", held_out, config.data) if held_out else _unread(config))
            if first:
                _warm_up(placement, resolved, warm, console, interruption)
                placement.load("grpo", sft.result(warm))
            done, kl_coef = _restore(placement, source, saved) if saved else (0, config.algorithm.kl_coef)
            clock = Clock(watchdog.heartbeat)
            reward = placement.reward or InlineReward(rewards, clock)
            Run(config, placement, reward, source, held_out, folder, console, interruption, clock, done, kl_coef).go()


class Run:
    """A run and what is known of it between two steps."""

    def __init__(
        self, config: RunConfig, placement: Placement, reward: Scorer, source: PromptSource, held_out: Prompts | None,
        folder: Path, console: Console, interruption: Interruption, clock: Clock, done: int, kl_coef: float,
    ) -> None:
        """`done` and `kl_coef`: the last step, and the coefficient of the divergence after it."""
        self.config, self.placement, self.reward, self.source, self.held_out = config, placement, reward, source, held_out
        self.folder, self.console, self.interruption, self.clock = folder, console, interruption, clock
        self.done = self.saved = done  # steps
        self.kl = Controller(config.algorithm, kl_coef)
        self.drawn = source.drawn  # prompts, after step `done`
        self.random: Mapping[str, Any] = {}  # states, after step `done`
        self.sample = Sampler(placement, reward, source, config, self.clock)
        self.ahead: Future[Sampled] | None = None  # the next step's samples, where they are drawn during this one
        self.ahead_since = 0.0  # when that was begun
        self.spans: list[Span] = []  # of the sampling ahead
        self.sinks = Sinks(folder, config.logging.tensorboard, done + 1 if done else 0)

    def go(self) -> None:
        """Every step from the first that is not done."""
        self._recorded()  # what was loaded and warmed up before the first step is not of it
        self.placement.traffic()
        try:
            self.console.start("grpo", self.config.train.steps, self.done)
            if self.done == 0 and self.config.evaluation and self.config.evaluation.before:
                self._evaluate_before()
            self.interruption.each(range(self.done + 1, self.config.train.steps + 1), self._step, self._keep)
        finally:
            self.console.stop()
            self.sinks.close()

    def _step(self, number: int) -> None:
        config, start = self.config, time.perf_counter()
        try:
            sampled = self._sampled(number)
            self._refuse_unscored(number, sampled)
            iteration = learn(self.placement, sampled, config, self.kl.coefficient, self.clock, self.interruption)
        except NonFinite as error:
            path = self.folder / f"nonfinite_step_{number:06d}.json"
            path.write_text(json.dumps({"step": number, **error.report}, indent=1) + "\n", encoding="utf-8")
            raise RunError(f"{error}; the run stops before that optimizer step, the numbers are in {path}") from error
        self.done, self.drawn = number, sampled.drawn
        apart = iteration.update.get("actor/kl_loss", iteration.update.get("actor/kl_penalty"))
        if apart is not None:
            self.kl.observe(apart, len(iteration.batch.samples))
        evaluation = None
        if config.evaluation and self._due(config.evaluation.every, config.evaluation.at_end):
            evaluation = self._evaluation()
        if self._due(config.train.save_every, at_end=True):
            with self.clock.span("save_checkpoint"):
                self._save()
        self.random = random_states()
        row, lines = self._row(iteration, start), [*sample_records(iteration, config.algorithm)]
        if evaluation:
            row, lines = row | self._evaluated(evaluation), [*lines, *evaluation_records(evaluation)]
        self.sinks.write(number, row, lines)
        self.console.step(grpo_line(number, config.train.steps, row))
        self.console.show(iteration.batch.groups, iteration.scores)
        self._warn(row)
        self.console.warn(failures([*iteration.scores, *iteration.replaced.scores]))
        self.console.warn(failures(evaluation.scores, "evaluation: ") if evaluation else None)

    def _sampled(self, number: int) -> Sampled:
        """This step's samples; the next step's are begun where they may be one version behind."""
        if not self.config.placement.max_staleness:
            return self.sample(number, synced(self.placement, self.clock))
        sampled = (self.ahead or self._begun(number)).result()
        self.ahead_since = time.perf_counter()
        self.ahead = self._begun(number + 1) if number < self.config.train.steps else None
        return sampled

    def _begun(self, number: int) -> Future[Sampled]:
        """Weights first, while nobody samples; then the sampling by itself."""
        receipt = synced(self.placement, self.clock)
        return begun(lambda: self.sample(number, receipt), f"sampling of step {number}")

    def _refuse_unscored(self, number: int, sampled: Sampled) -> None:
        """A step that has no score at all has nothing to learn, and neither will the next: the run stops where it is."""
        scores = [score for group in [*sampled.kept.scores, *sampled.replaced.scores] for score in group]
        if any(score.value is not None for score in scores):
            return
        self._keep()
        raise RunError(
            f"step {number}: the reward of each of its {len(scores)} samples failed; the first: {scores[0].detail}; mend the"
            " reward or the rows, then go on with --resume or start again"
        )

    def _recorded(self) -> list[Span]:
        """By every process since the last call."""
        return [*self.clock.take(), *self.placement.spans()]

    def _evaluation(self) -> Evaluation:
        """When the sampling that is under way has ended."""
        assert self.held_out is not None
        if self.ahead:
            wait([self.ahead])
        with self.clock.span("evaluate"):
            return evaluate(self.placement, self.reward, self.held_out, self.config)

    def _evaluated(self, evaluation: Evaluation) -> Metrics:
        assert self.held_out is not None
        return evaluation.metrics() | {"eval/dropped_long": float(self.held_out.dropped_long)}

    def _evaluate_before(self) -> None:
        evaluation = self._evaluation()
        seconds = sum(span.end - span.start for span in self._recorded() if span.stage == "evaluate")
        row = self._evaluated(evaluation) | {"timing/evaluate": seconds}
        self.sinks.write(0, row, evaluation_records(evaluation))
        score = f"eval {row['eval/score']:.3f}" if "eval/score" in row else "eval without a score"
        self.console.say(f"before training  {score} on {len(evaluation.groups)} rows")
        self.console.warn(failures(evaluation.scores, "evaluation: "))

    def _due(self, every: int, at_end: bool) -> bool:
        return bool(every and self.done % every == 0) or (at_end and self.done == self.config.train.steps)

    def _keep(self) -> None:
        """The last finished step, unless a checkpoint has it."""
        if self.done > self.saved:
            self._save(random=self.random)

    def _save(self, **random: Any) -> None:
        """`random`: the random states, where those of now are already the next step's."""
        state = {"step": self.done, "drawn": self.drawn, "kl_coef": self.kl.coefficient, **random}
        save_checkpoint(self.folder, f"step_{self.done:06d}", state, self.placement.actor.save)
        self.saved = self.done

    def _row(self, iteration: Iteration, start: float) -> Metrics:
        batch, inputs = iteration.batch, iteration.inputs
        timing = self._timing(start)
        sampled = [*batch.groups, *iteration.replaced.groups]
        return {
            **score_metrics([*iteration.scores, *iteration.replaced.scores]),
            **metrics.spread("grpo/rewards", inputs.penalized[inputs.valid].tolist()),
            **metrics.spread("grpo/advantages", batch.sample_values(batch.advantages)),
            **{"grpo/lr" if name == "lr" else name: value for name, value in iteration.update.items()},
            **metrics.lengths(sampled),
            "data/dropped_long": float(self.source.dropped_long),
            **({"data/replaced_groups": float(len(iteration.replaced.groups))} if self.config.algorithm.max_refills else {}),
            **({"grpo/kl_coef": batch.kl_coef} if self.config.algorithm.kl_target else {}),
            **(metrics.images(sampled) if self.placement.encoder else {}),
            **metrics.sync(iteration.receipt),
            **self._staleness(batch),
            **self.placement.memory(),
            **self.placement.traffic(),
            **timing,
            **metrics.throughput(sampled, timing, devices=self.placement.devices),
        }

    def _timing(self, start: float) -> Metrics:
        """Of this step, to which its sampling belongs whenever it was done."""
        spans = [*self.spans, *self._recorded()]
        outside = [span for span in spans if span.stage in OUTSIDE_ITERATION]
        spans = [span for span in spans if span in outside or not _part_of(outside, span)]
        parts: dict[bool, list[Span]] = {True: [], False: []}
        for span in spans:
            ahead = self.ahead is not None and span.stage in SAMPLING and span.start >= self.ahead_since
            parts[ahead].append(span)
        self.spans = parts[True]
        return timings(parts[False], start, time.perf_counter(), beside=self.spans)

    def _staleness(self, batch: Batch) -> Metrics:
        if not self.config.placement.max_staleness:
            return {}
        trained = self.placement.version - 1
        return {"data/staleness": float(max(trained - sample.policy_version for sample in batch.samples))}

    def _warn(self, row: Metrics) -> None:
        limit = self.config.rollout.max_mismatch
        if row.get("mismatch/mean", 0.0) > limit:
            self.console.warn(
                f"the engine's log-probabilities differ from the actor's by {row['mismatch/mean']:.3f} on average,"
                f" more than rollout.max_mismatch {limit}; likely causes: a low rollout.top_p or top_k, or another precision in"
                " the engine"
            )


def _part_of(outside: Sequence[Span], span: Span) -> bool:
    """Whether an evaluation or a save did it. What is sampled beside a save is for the next step; beside an evaluation, nothing
    is sampled for a step."""
    middle = (span.start + span.end) / 2
    within = [one.stage for one in outside if one.start <= middle <= one.end]
    return "evaluate" in within or (bool(within) and span.stage not in SAMPLING)


def _warm_up(placement: Placement, resolved: ResolvedModel, folder: Path, console: Console, interruption: Interruption) -> None:
    """From the warm start's own last checkpoint, if it has one."""
    source = resolved.prompts(resolved.config.seed)
    task = sft.imitation(placement, resolved, source)
    Loop(task, placement.actor, source, resolved.config, folder, console, interruption).go(newest_checkpoint(folder))


def _resumed(folder: Path, warm: Path | None) -> Path | None:
    """The checkpoint that the run goes on from; None when it has not left its warm start."""
    if warm is not None and newest_checkpoint(warm) and not newest_checkpoint(folder):
        return None
    return latest_checkpoint(folder)


def _restore(placement: Placement, source: PromptSource, saved: Path) -> tuple[int, float]:
    """The step of the checkpoint, and the coefficient of the divergence after it."""
    placement.actor.load(saved)
    state = read_state(saved)
    placement.version, source.drawn = state["step"], state["drawn"]
    restore_random_states(state["random"])
    return state["step"], state["kl_coef"]
