"""One GRPO iteration (`step`), and the run around it (`train`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlcore import checkpoint, metrics, sft
from rlcore.algorithms import grpo
from rlcore.config import RunConfig, SamplingConfig
from rlcore.console import Console, grpo_line
from rlcore.data import PromptSource, encode_all, load_rows
from rlcore.interruption import Interruption
from rlcore.protocols import Backend
from rlcore.rewards.runner import RewardFunctions
from rlcore.types import Batch, Group, Metrics, Prompt, Receipt, Sampling, Score
from rlcore.worker import Policy, Worker, start_rollout

EVALUATION_SEED = 1 << 40  # far from every step's


@dataclass(frozen=True)
class Iteration:
    """What one step did."""

    batch: Batch
    scores: list[list[Score]]
    receipt: Receipt  # of the weights that were sampled from, whenever they were sent
    update: Metrics


def step(
    worker: Worker, prompts: Sequence[Prompt], config: RunConfig, number: int, clock: metrics.Clock, interruption: Interruption
) -> Iteration:
    """Sample, score, compare, update. Weights go first: a broken path fails before any training."""
    with clock.span("resharding_to_infer"):
        receipt = worker.sync_weights()
    with clock.span("rollout"):
        groups = worker.rollout.generate(prompts, sampling(config.rollout, config.algorithm.group_size, config.seed + number))
    with clock.span("reward"):
        scores = worker.reward.score(groups)
    with clock.span("adv"):
        batch = with_advantages(Batch.of(groups), scores, config)
    if worker.reference is not None:
        with clock.span("reference_model"):
            batch = replace(batch, ref_logprobs=worker.reference.logprobs(batch))
    if config.train.minibatches_per_step > 1:
        with clock.span("old_log_p"):
            batch = replace(batch, old_logprobs=worker.actor.logprobs(batch))
    interruption.hold()
    with clock.span("update"):
        update = worker.update(batch)
    return Iteration(batch, scores, receipt, update)


@dataclass(frozen=True)
class Evaluation:
    """Held-out rows, sampled and scored."""

    groups: list[Group]
    scores: list[list[Score]]

    def metrics(self) -> Metrics:
        """`eval/score`: the mean over rows of each row's mean. A failed reward counts in `eval/error`, never as 0."""
        values = [[score.value for score in group if score.value is not None] for group in self.scores]
        rows = [sum(row) / len(row) for row in values if row]
        lengths = [len(sample.token_ids) for group in self.groups for sample in group.samples]
        return {
            **({"eval/score": sum(rows) / len(rows)} if rows else {}),
            "eval/rows": float(len(self.groups)),
            "eval/error": float(sum(score.status != "value" for group in self.scores for score in group)),
            "eval/response_length": sum(lengths) / len(lengths),
        }


def evaluate(worker: Worker, prompts: Sequence[Prompt], config: RunConfig, clock: metrics.Clock) -> Evaluation:
    """Every held-out row once, under the evaluation's own sampling."""
    assert config.evaluation is not None
    with clock.span("evaluate"):
        worker.sync_weights()
        groups = worker.rollout.generate(prompts, sampling(config.evaluation, config.evaluation.samples, EVALUATION_SEED))
        return Evaluation(groups, worker.reward.score(groups))


def train(
    config: RunConfig, backend: Backend, folder: Path, resume: bool, console: Console, begin: Callable[[], object]
) -> None:
    """The whole run: warm start, evaluation, steps, checkpoints. An interrupt saves the last finished step and leaves.

    `begin` is called when everything has loaded and before anything is written: a run that cannot start leaves no trace.
    """
    with Interruption() as interruption:
        saved = checkpoint.latest(folder) if resume else None
        checkpoint.seed_random_states(config.seed)
        policy = Policy(config, backend)
        source = policy.prompts(config.seed)
        held_out = _held_out(policy)
        if config.sft:
            sft.check_targets(source.rows, policy)
        reward, model = RewardFunctions(config.reward), policy.load()
        engine = start_rollout(policy, model)
        begin()
        console.warn(policy.caution)
        if config.sft:
            model = sft.warm_start(policy, model, folder / "sft", console)
        worker = Worker(policy, model, engine, reward)
        done = _restore(worker, source, saved) if saved else 0
        run = Run(config, worker, source, held_out, folder, console, interruption, done)
        run.go()


class Run:
    """A run and what is known of it between two steps."""

    def __init__(
        self, config: RunConfig, worker: Worker, source: PromptSource, held_out: Sequence[Prompt], folder: Path,
        console: Console, interruption: Interruption, done: int,
    ) -> None:
        self.config, self.worker, self.source, self.held_out = config, worker, source, held_out
        self.folder, self.console, self.interruption = folder, console, interruption
        self.done = self.saved = done  # steps
        self.drawn = source.drawn  # prompts, after step `done`
        self.clock = metrics.Clock()
        self.sinks = metrics.Sinks(folder, config.logging.tensorboard, done + 1 if done else 0)

    def go(self) -> None:
        """Every step from the first that is not done."""
        try:
            self.console.start("grpo", self.config.train.steps, self.done)
            if self.done == 0 and self.config.evaluation and self.config.evaluation.before:
                self._evaluate_before()
            for number in range(self.done + 1, self.config.train.steps + 1):
                self.interruption.release()
                self._step(number)
            self.interruption.release()
        except KeyboardInterrupt:
            if self.done > self.saved and not self.interruption.abandoned:
                self._save()
            raise
        finally:
            self.console.stop()
            self.sinks.close()

    def _step(self, number: int) -> None:
        config, start = self.config, time.perf_counter()
        with self.clock.span("data"):
            prompts = self.source.draw(config.train.prompts_per_step)
        iteration = step(self.worker, prompts, config, number, self.clock, self.interruption)
        self.done, self.drawn = number, self.source.drawn
        evaluation = None
        if config.evaluation and self._due(config.evaluation.every, config.evaluation.at_end):
            evaluation = evaluate(self.worker, self.held_out, config, self.clock)
        if self._due(config.train.save_every, at_end=True):
            with self.clock.span("save_checkpoint"):
                self._save()
        row = self._row(iteration, start) | (evaluation.metrics() if evaluation else {})
        self.sinks.write(number, row, [*records(iteration, config), *(evaluation_records(evaluation) if evaluation else ())])
        self.console.step(grpo_line(number, config.train.steps, row))
        self.console.show(iteration.batch.groups, iteration.scores)
        self._warn(row)

    def _evaluate_before(self) -> None:
        evaluation = evaluate(self.worker, self.held_out, self.config, self.clock)
        row = evaluation.metrics() | {"timing/evaluate": sum(span.end - span.start for span in self.clock.take())}
        self.sinks.write(0, row, evaluation_records(evaluation))
        self.console.say(f"before training  eval {row.get('eval/score', float('nan')):.3f} on {len(self.held_out)} rows")

    def _due(self, every: int, at_end: bool) -> bool:
        return bool(every and self.done % every == 0) or (at_end and self.done == self.config.train.steps)

    def _save(self) -> None:
        state = {"step": self.done, "drawn": self.drawn}
        checkpoint.save(self.folder, f"step_{self.done:06d}", state, self.worker.actor.save)
        self.saved = self.done

    def _row(self, iteration: Iteration, start: float) -> Metrics:
        batch = iteration.batch
        timing = metrics.timings(self.clock.take(), start, time.perf_counter())
        return {
            **metrics.score_metrics(iteration.scores),
            **metrics.spread("grpo/advantages", batch.sample_values(batch.advantages)),
            **{"grpo/lr" if name == "lr" else name: value for name, value in iteration.update.items()},
            **metrics.lengths(batch.groups),
            "data/dropped_long": float(self.source.dropped_long),
            **metrics.sync(iteration.receipt),
            **metrics.memory(),
            **timing,
            **metrics.throughput(batch.groups, timing, devices=1),
        }

    def _warn(self, row: Metrics) -> None:
        limit = self.config.rollout.max_mismatch
        if row.get("mismatch/mean", 0.0) > limit:
            self.console.warn(
                f"the engine's log-probabilities differ from the actor's by {row['mismatch/mean']:.3f} on average,"
                f" more than rollout.max_mismatch {limit}; likely causes: a low rollout.top_p or top_k, or another precision in"
                " the engine"
            )


def sampling(config: SamplingConfig, samples: int, seed: int) -> Sampling:
    return Sampling(samples, config.max_new_tokens, config.temperature, config.top_p, config.top_k, seed)


def with_advantages(batch: Batch, scores: Sequence[Sequence[Score]], config: RunConfig) -> Batch:
    """The batch with each sample's advantage on its tokens; samples whose reward failed are masked out of the loss."""
    flat = [score for group in scores for score in group]
    rewards = torch.tensor([0.0 if score.value is None else score.value for score in flat])
    valid = torch.tensor([score.value is not None for score in flat])
    groups = torch.tensor([number for number, group in enumerate(scores) for _ in group])
    advantages = grpo.advantages(rewards, groups, valid, config.algorithm)
    return replace(batch, advantages=batch.per_token(advantages), loss_mask=batch.per_token(valid))


def records(iteration: Iteration, config: RunConfig) -> Iterator[dict[str, Any]]:
    """A line of samples.jsonl for every sample: what it said, what it got, and why it taught nothing, if so."""
    advantages = iter(iteration.batch.sample_values(iteration.batch.advantages))
    regularized = bool(config.algorithm.kl_coef or config.algorithm.entropy_coef)
    for record, score in _samples(iteration.batch.groups, iteration.scores):
        advantage = next(advantages)
        reason = None
        if score.value is None:
            reason = f"reward {score.status}"
        elif advantage == 0 and not regularized:
            reason = "no advantage: every sample of the group scored the same"
        yield {"phase": "train", **record, "advantage": advantage, "not_trained": reason}


def evaluation_records(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    return ({"phase": "eval", **record} for record, _ in _samples(evaluation.groups, evaluation.scores))


def _samples(groups: Sequence[Group], scores: Sequence[Sequence[Score]]) -> Iterator[tuple[dict[str, Any], Score]]:
    for group, group_scores in zip(groups, scores, strict=True):
        for index, (sample, score) in enumerate(zip(group.samples, group_scores, strict=True)):
            yield {
                "row": group.prompt.row.id, "sample": index, "response": sample.text, "answer": group.prompt.row.answer,
                "finish": sample.finish, "prompt_tokens": len(group.prompt.token_ids), "response_tokens": len(sample.token_ids),
                "policy_version": sample.policy_version, "score": score.value, "status": score.status,
                "parts": dict(score.parts), "detail": score.detail,
            }, score  # fmt: skip


def _held_out(policy: Policy) -> Sequence[Prompt]:
    data = policy.config.data
    if policy.config.evaluation is None or data.eval is None:
        return []
    return encode_all(load_rows(data.eval, "data.eval"), policy.adapter, data.max_prompt_tokens, data.long_prompts)


def _restore(worker: Worker, source: PromptSource, saved: Path) -> int:
    worker.actor.load(saved)
    state = checkpoint.read_state(saved)
    worker.version, source.drawn = state["step"], state["drawn"]
    checkpoint.restore_random_states(state["random"])
    return state["step"]
