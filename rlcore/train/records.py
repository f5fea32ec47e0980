"""Sample records and score metrics of a step or an evaluation, and the warning about failed rewards."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlcore.algorithms import dapo
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.config.sections import ONLY
from rlcore.monitor.metrics import spread
from rlcore.train.results import Evaluation
from rlcore.train.sampling import Scored
from rlcore.types import AdvantageInputs, Batch, Group, Metrics, Receipt, Score


@dataclass(frozen=True)
class Iteration:
    """Result of one step."""

    batch: Batch
    scores: list[list[Score]]  # of the batch's groups
    inputs: AdvantageInputs
    replaced: Scored  # groups without signal, replaced by other prompts'
    receipt: Receipt  # of the weights that sampled, even if synced in an earlier step
    update: Metrics


def score_metrics(scores: Sequence[Sequence[Score]]) -> Metrics:
    """`grpo/score/*` over samples that have a value, `reward/<part>` each reward's mean, `reward/{timeout,error}` counts,
    and the share of groups without two different scores."""
    flat = [score for group in scores for score in group]
    valued = [score.value for score in flat if score.value is not None]
    names = dict.fromkeys(name for score in flat for name in score.parts)
    return {
        **spread("grpo/score", valued),
        **{f"reward/{name}": statistics.fmean(score.parts[name] for score in flat if name in score.parts) for name in names},
        "reward/timeout": float(sum(score.status == "timeout" for score in flat)),
        "reward/error": float(sum(score.status == "error" for score in flat)),
        "grpo/groups_without_signal": sum(not dapo.has_signal(group) for group in scores) / len(scores),
    }


def source_metrics(groups: Sequence[Group], scores: Sequence[Sequence[Score]]) -> Metrics:
    """`source/<name>/{score,samples,response_length}` where a step has rows of several sources."""
    found: Metrics = {}
    names = sorted({group.prompt.row.source for group in groups})
    for name in names if len(names) > 1 else ():
        mine = [(group, score) for group, score in zip(groups, scores, strict=True) if group.prompt.row.source == name]
        values = [score.value for _, group_scores in mine for score in group_scores if score.value is not None]
        lengths = [len(sample.token_ids) for group, _ in mine for sample in group.samples]
        found |= {f"source/{name}/score": statistics.fmean(values)} if values else {}
        found |= {f"source/{name}/samples": float(len(lengths)), f"source/{name}/response_length": statistics.fmean(lengths)}
    return found


def sample_records(iteration: Iteration, config: AlgorithmConfig) -> Iterator[dict[str, Any]]:
    """Yield a samples.jsonl line per sample: response, score, advantage, and why it was not trained on, if so."""
    batch = iteration.batch
    assert batch.advantages is not None, "a finished iteration has them"
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
    """Explain an advantage of 0 by the rewards it was compared with."""
    scored = sum(score.value is not None for score in group)
    if dapo.has_signal(group) or config.advantage in ("batch", "gae"):
        return "its reward is the mean of those it is compared with"
    return "every sample of the group scored the same" if scored > 1 else f"{scored or 'no'} sample of the group has a score"


def failures(scores: Sequence[Sequence[Score]], where: str = "") -> str | None:
    """Warning with the number of failed rewards; None if none failed."""
    flat = [score for group in scores for score in group]
    failed = [score for score in flat if score.value is None]
    if not failed:
        return None
    counts = ", ".join(f"{count} {status}" for status, count in Counter(score.status for score in failed).items())
    return f"{where}{len(failed)} of {len(flat)} rewards failed ({counts}); the first: {failed[0].detail}"


def evaluation_records(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Yield a samples.jsonl line per sample of every held-out set."""
    for one in evaluation.sets:
        named = {} if one.name == ONLY else {"set": one.name}
        yield from ({"phase": "eval", **named, **record} for record, _ in _samples(one.groups, one.scores))


def _samples(groups: Sequence[Group], scores: Sequence[Sequence[Score]]) -> Iterator[tuple[dict[str, Any], Score]]:
    for group, group_scores in zip(groups, scores, strict=True):
        for index, (sample, score) in enumerate(zip(group.samples, group_scores, strict=True)):
            yield {
                "row": group.prompt.row.id, "source": group.prompt.row.source, "sample": index, "response": sample.text,
                "answer": group.prompt.row.answer,
                "finish": sample.finish, "prompt_tokens": len(group.prompt.token_ids), "response_tokens": len(sample.token_ids),
                "policy_version": sample.policy_version, "score": score.value, "status": score.status,
                "parts": dict(score.parts), "detail": score.detail,
            }, score  # fmt: skip
