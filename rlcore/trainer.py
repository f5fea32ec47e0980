"""One GRPO iteration (`step`), and the run around it (`train`)."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlcore import checkpoint, metrics, sft
from rlcore.algorithms import dapo
from rlcore.algorithms.advantages import advantages
from rlcore.algorithms.kl import Controller, divergence
from rlcore.backend import Backend
from rlcore.config import AlgorithmConfig, RunConfig, SamplingConfig
from rlcore.console import Console, grpo_line
from rlcore.data import Prompts, PromptSource, encode_all, left_out, load_rows
from rlcore.errors import ConfigError, NonFinite, RunError
from rlcore.interruption import Interruption
from rlcore.placement import InlineReward, Placement, Scorer, results, start
from rlcore.rewards.runner import RewardFunctions
from rlcore.types import Batch, Group, Metrics, Outcome, Prompt, Receipt, Sampling, Score
from rlcore.watch import Watch
from rlcore.worker import Policy

T = TypeVar("T")
EVALUATION_SEED = 1 << 31  # far from every step's; a host's generators read the lower 32 bits only
REFILL_SEED = 1 << 24  # from one refill of a step to the next
SAMPLING = frozenset({"resharding_to_infer", "data", "image_embeds", "rollout", "reward"})
"""Stages of drawing and scoring samples, which for the next step may happen during this one."""


@dataclass(frozen=True)
class Scored:
    """Groups and what the reward said of each of their samples."""

    groups: list[Group]
    scores: list[list[Score]]

    def __add__(self, other: Scored) -> Scored:
        return Scored(self.groups + other.groups, self.scores + other.scores)


@dataclass(frozen=True)
class Iteration:
    """What one step did."""

    batch: Batch
    scores: list[list[Score]]  # of the batch's groups
    outcome: Outcome
    replaced: Scored  # groups without signal that other prompts took the place of
    receipt: Receipt  # of the weights that were sampled from, whenever they were sent
    update: Metrics


@dataclass(frozen=True)
class Sampled:
    """What a step learns from."""

    kept: Scored
    replaced: Scored
    receipt: Receipt
    drawn: int  # prompts, in the whole run up to here


@dataclass(frozen=True)
class Sampler:
    """Draws a step's prompts, samples and scores them."""

    placement: Placement
    reward: Scorer
    source: PromptSource
    config: RunConfig
    clock: metrics.Clock

    def __call__(self, number: int, receipt: Receipt) -> Sampled:
        """Of step `number`, with the weights of the receipt."""
        kept, replaced = collect(self.placement, self.reward, self.source.draw, self.config, number, self.clock)
        return Sampled(kept, replaced, receipt, self.source.drawn)


def synced(placement: Placement, clock: metrics.Clock) -> Receipt:
    with clock.span("resharding_to_infer"):
        return placement.sync_weights()


def step(sample: Sampler, number: int, kl_coef: float, interruption: Interruption) -> Iteration:
    """Sample, score, compare, update. Weights go first: a broken path fails before any training."""
    sampled = sample(number, synced(sample.placement, sample.clock))
    return learn(sample.placement, sampled, sample.config, kl_coef, sample.clock, interruption)


def learn(
    placement: Placement, sampled: Sampled, config: RunConfig, kl_coef: float, clock: metrics.Clock,
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
        outcome = outcome_of(batch, kept.scores, config)
        batch = with_advantages(batch, outcome, config.algorithm)
    interruption.hold()
    update = placement.update(batch)
    if batch.ref_logprobs is not None and config.algorithm.kl_in == "reward":
        update["actor/kl_penalty"] = float(outcome.penalties.mean()) / kl_coef  # which a controller keeps above 0
    return Iteration(batch, kept.scores, outcome, sampled.replaced, sampled.receipt, update)


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


def collect(
    placement: Placement, reward: Scorer, draw: Callable[[int], Sequence[Prompt]], config: RunConfig, number: int,
    clock: metrics.Clock,
) -> tuple[Scored, Scored]:
    """A step's groups, and those that were replaced because they taught nothing (DAPO's dynamic sampling).

    At most algorithm.max_refills times other prompts are drawn for them; what is still missing then stays missing, but a step
    in which no group at all has signal keeps the last ones.
    """
    kept, replaced = Scored([], []), Scored([], [])
    for refill in range(config.algorithm.max_refills + 1):
        with clock.span("data"):
            prompts = draw(config.train.prompts_per_step - len(kept.groups))
        prompts = placement.encoder.embed(prompts) if placement.encoder else prompts
        seed = config.seed + number + refill * REFILL_SEED
        drawn = placement.rollout.stream(prompts, sampling(config.rollout, config.algorithm.group_size, seed))
        scored = scored_in_order(drawn, reward)
        if not config.algorithm.max_refills:
            return scored, replaced
        signal = [dapo.has_signal(scores) for scores in scored.scores]
        kept += _chosen(scored, signal)
        replaced += _chosen(scored, [not one for one in signal])
        if len(kept.groups) == config.train.prompts_per_step:
            break
    if not kept.groups:
        last = len(scored.groups)
        kept, replaced = scored, Scored(replaced.groups[:-last], replaced.scores[:-last])
    return kept, replaced


def scored_in_order(drawn: Iterable[tuple[int, Group]], reward: Scorer) -> Scored:
    """Each group as it comes, while engines in other processes go on with the rest."""
    begun = {place: (group, reward.begin(group)) for place, group in drawn}
    in_order = [begun[place] for place in sorted(begun)]
    return Scored([group for group, _ in in_order], results([scores for _, scores in in_order]))


def needs_old_logprobs(config: RunConfig) -> bool:
    """Whether the actor's log-probabilities are wanted before the update gives them anyway."""
    updates = config.train.minibatches_per_step * config.train.epochs_per_step
    return updates > 1 or (config.algorithm.kl_coef > 0 and config.algorithm.kl_in == "reward")


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


def evaluate(placement: Placement, reward: Scorer, prompts: Sequence[Prompt], config: RunConfig) -> Evaluation:
    """Every held-out row once, under the evaluation's own sampling."""
    assert config.evaluation is not None
    placement.sync_weights()
    prompts = placement.encoder.embed(prompts) if placement.encoder else prompts
    drawn = placement.rollout.stream(prompts, sampling(config.evaluation, config.evaluation.samples, EVALUATION_SEED))
    scored = scored_in_order(drawn, reward)
    return Evaluation(scored.groups, scored.scores)


def train(
    config: RunConfig, backend: Backend, folder: Path, resume: bool, console: Console, begin: Callable[[], object]
) -> None:
    """The whole run: warm start, evaluation, steps, checkpoints. An interrupt saves the last finished step and leaves.

    `begin` is called when everything has loaded and before anything is written: a run that cannot start leaves no trace.
    """
    if not config.reward:
        raise ConfigError("reward: must list at least one reward, for example [{name: math}]")
    with Interruption() as interruption, Watch(config.placement.stall_seconds, folder) as watch:
        warm = folder / "sft" if config.sft else None
        saved = _resumed(folder, warm) if resume else None
        checkpoint.seed_random_states(config.seed)
        policy = Policy(config, backend)
        source = policy.prompts(config.seed)
        held_out = _held_out(policy)
        if config.sft:
            sft.check_targets(source.rows, policy)
        rewards = RewardFunctions(config.reward)
        with start(policy, watch) as placement:
            first = config.sft is not None and saved is None and sft.missing(warm, config.sft.steps)
            placement.load("sft" if first else "grpo", None if first else sft.result(warm))
            placement.start_engines()
            begin()
            console.say(policy.notice)
            console.warn(policy.caution)
            console.warn(left_out("data.train", source, config.data))
            console.warn(left_out("data.eval", held_out, config.data) if held_out else _unread(config))
            if first:
                _warm_up(placement, policy, warm, console, interruption)
                placement.load("grpo", sft.result(warm))
            done, kl_coef = _restore(placement, source, saved) if saved else (0, config.algorithm.kl_coef)
            clock = metrics.Clock(watch.pulse)
            reward = placement.reward or InlineReward(rewards, clock)
            Run(config, placement, reward, source, held_out, folder, console, interruption, clock, done, kl_coef).go()


class Run:
    """A run and what is known of it between two steps."""

    def __init__(
        self, config: RunConfig, placement: Placement, reward: Scorer, source: PromptSource, held_out: Prompts | None,
        folder: Path, console: Console, interruption: Interruption, clock: metrics.Clock, done: int, kl_coef: float,
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
        self.spans: list[metrics.Span] = []  # of the sampling ahead
        self.sinks = metrics.Sinks(folder, config.logging.tensorboard, done + 1 if done else 0)

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
        self.random = checkpoint.random_states()
        row, lines = self._row(iteration, start), [*records(iteration, config.algorithm)]
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

    def _recorded(self) -> list[metrics.Span]:
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
        checkpoint.save(self.folder, f"step_{self.done:06d}", state, self.placement.actor.save)
        self.saved = self.done

    def _row(self, iteration: Iteration, start: float) -> Metrics:
        batch, outcome = iteration.batch, iteration.outcome
        timing = self._timing(start)
        sampled = [*batch.groups, *iteration.replaced.groups]
        return {
            **metrics.score_metrics([*iteration.scores, *iteration.replaced.scores]),
            **metrics.spread("grpo/rewards", outcome.penalized[outcome.valid].tolist()),
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
        outside = [span for span in spans if span.stage in metrics.OUTSIDE_ITERATION]
        spans = [span for span in spans if span in outside or not _part_of(outside, span)]
        parts: dict[bool, list[metrics.Span]] = {True: [], False: []}
        for span in spans:
            ahead = self.ahead is not None and span.stage in SAMPLING and span.start >= self.ahead_since
            parts[ahead].append(span)
        self.spans = parts[True]
        return metrics.timings(parts[False], start, time.perf_counter(), beside=self.spans)

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


def _part_of(outside: Sequence[metrics.Span], span: metrics.Span) -> bool:
    """Whether an evaluation or a save did it. What is sampled beside a save is for the next step; beside an evaluation, nothing
    is sampled for a step."""
    middle = (span.start + span.end) / 2
    within = [one.stage for one in outside if one.start <= middle <= one.end]
    return "evaluate" in within or (bool(within) and span.stage not in SAMPLING)


def sampling(config: SamplingConfig, samples: int, seed: int) -> Sampling:
    return Sampling(samples, config.max_new_tokens, config.temperature, config.top_p, config.top_k, seed)


def outcome_of(batch: Batch, scores: Sequence[Sequence[Score]], config: RunConfig) -> Outcome:
    """What the advantages are made of: scores, less what long responses and distance from the reference cost."""
    algorithm = config.algorithm
    flat = [score for group in scores for score in group]
    valid = torch.tensor([score.value is not None for score in flat])
    rewards = torch.tensor([0.0 if score.value is None else score.value for score in flat], dtype=torch.float64)
    if algorithm.overlong_penalty:
        rewards += dapo.overlong_penalty(batch.lengths, config.rollout.max_new_tokens, algorithm) * valid
    penalties = torch.zeros(len(batch.loss_mask), dtype=torch.float64)
    if batch.ref_logprobs is not None and algorithm.kl_in == "reward":
        assert batch.old_logprobs is not None
        penalties = batch.kl_coef * divergence(batch.old_logprobs, batch.ref_logprobs, algorithm.kl_estimator).double()
    groups = torch.tensor([number for number, group in enumerate(scores) for _ in group])
    return Outcome(rewards, valid, groups, batch.lengths, penalties, batch.values)


def with_advantages(batch: Batch, outcome: Outcome, config: AlgorithmConfig) -> Batch:
    """The batch with each token's advantage; samples whose reward failed, and truncated ones if so set, leave the loss."""
    values, returns = advantages(outcome, config)
    counts = outcome.valid
    if config.mask_truncated:
        counts = counts & torch.tensor([sample.finish == "stop" for sample in batch.samples])
    return replace(batch, advantages=values, returns=returns, loss_mask=batch.per_token(counts))


def records(iteration: Iteration, config: AlgorithmConfig) -> Iterator[dict[str, Any]]:
    """A line of samples.jsonl for every sample: what it said, what it got, and why it taught nothing, if so."""
    batch = iteration.batch
    values = batch.sample_values(batch.advantages)
    regularized = bool(config.kl_coef or config.entropy_coef)
    mates = [group for group in iteration.scores for _ in group]
    for (record, score), group, advantage in zip(_samples(batch.groups, iteration.scores), mates, values, strict=True):
        reason = None
        if score.value is None:
            reason = f"reward {score.status}"
        elif config.mask_truncated and record["finish"] == "length":
            reason = "cut off at rollout.max_new_tokens"
        elif advantage == 0 and not regularized:
            reason = f"no advantage: {_equal_to(group, config)}"
        yield {"phase": "train", **record, "advantage": advantage, "not_trained": reason}
    mates = [group for group in iteration.replaced.scores for _ in group]
    for (record, _), group in zip(_samples(iteration.replaced.groups, iteration.replaced.scores), mates, strict=True):
        reason = f"no advantage: {_equal_to(group, config)}, so another prompt took its place"
        yield {"phase": "train", **record, "advantage": None, "not_trained": reason}


def _equal_to(group: Sequence[Score], config: AlgorithmConfig) -> str:
    """What a reward was compared with when that gave it no advantage."""
    scored = sum(score.value is not None for score in group)
    if dapo.has_signal(group) or config.advantage in ("batch", "gae"):
        return "its reward is the mean of those it is compared with"
    return "every sample of the group scored the same" if scored > 1 else f"{scored or 'no'} sample of the group has a score"


def failures(scores: Sequence[Sequence[Score]], where: str = "") -> str | None:
    """What is said of rewards that failed, if there are any."""
    flat = [score for group in scores for score in group]
    failed = [score for score in flat if score.value is None]
    if not failed:
        return None
    counts = ", ".join(f"{count} {status}" for status, count in Counter(score.status for score in failed).items())
    return f"{where}{len(failed)} of {len(flat)} rewards failed ({counts}); the first: {failed[0].detail}"


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


def _chosen(scored: Scored, wanted: Sequence[bool]) -> Scored:
    return Scored(list(compress(scored.groups, wanted)), list(compress(scored.scores, wanted)))


def _held_out(policy: Policy) -> Prompts | None:
    data = policy.config.data
    if policy.config.evaluation is None or data.eval is None:
        return None
    return encode_all(load_rows(data.eval, "data.eval"), policy.adapter, data.max_prompt_tokens, data.long_prompts)


def _unread(config: RunConfig) -> str | None:
    """What is said of held-out rows that nothing asks for; a run may leave its evaluation out for once."""
    if config.data.eval is None:
        return None
    return "data.eval: no row of it is evaluated, because evaluation is not set; add it (evaluation: {}) or remove data.eval"


def _warm_up(placement: Placement, policy: Policy, folder: Path, console: Console, interruption: Interruption) -> None:
    """From the warm start's own last checkpoint, if it has one."""
    source = policy.prompts(policy.config.seed)
    task = sft.imitation(placement, policy, source)
    sft.Loop(task, placement.actor, source, policy.config, folder, console, interruption).go(checkpoint.newest(folder))


def _resumed(folder: Path, warm: Path | None) -> Path | None:
    """The checkpoint that the run goes on from; None when it has not left its warm start."""
    if warm is not None and checkpoint.newest(warm) and not checkpoint.newest(folder):
        return None
    return checkpoint.latest(folder)


def _restore(placement: Placement, source: PromptSource, saved: Path) -> tuple[int, float]:
    """The step of the checkpoint, and the coefficient of the divergence after it."""
    placement.actor.load(saved)
    state = checkpoint.read_state(saved)
    placement.version, source.drawn = state["step"], state["drawn"]
    checkpoint.restore_random_states(state["random"])
    return state["step"], state["kl_coef"]
