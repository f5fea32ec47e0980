"""Evaluation on held-out rows: sampled, scored and summed up by set, source and level."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from pathlib import Path
from statistics import fmean
from typing import Any

from rlcore.config.schema import RunConfig
from rlcore.config.sections import ONLY, EvaluationConfig
from rlcore.data.prompts import Encoded
from rlcore.runtime.placement import Placement
from rlcore.runtime.roles import Scorer
from rlcore.train.sampling import sampling, scored_in_order
from rlcore.types import Group, Metrics, Prompt, Row, Score

EVALUATION_SEED = 1 << 31  # far from every step's seed; CPU generators read the lower 32 bits only


@dataclass(frozen=True)
class SetResult:
    """Samples and scores of one held-out set."""

    name: str
    settings: EvaluationConfig
    groups: list[Group]
    scores: list[list[Score]]
    dropped_long: int  # rows dropped because their prompt is too long

    def metrics(self) -> Metrics:
        """`score`: mean over rows of the row's mean score; `accuracy`: of the share of its samples that pass. A failed reward
        counts in `error`, never as 0."""
        lengths = [len(sample.token_ids) for group in self.groups for sample in group.samples]
        cut = [sample.finish == "length" for group in self.groups for sample in group.samples]
        return {
            **_summary(self.scores, self.settings.passing_score),
            **_pass_at(self.scores, self.settings),
            "rows": float(len(self.groups)),
            "error": float(sum(score.value is None for group in self.scores for score in group)),
            "response_length": fmean(lengths),
            "clip_ratio": fmean(cut),
            "dropped_long": float(self.dropped_long),
        }

    def parts(self) -> dict[str, dict[str, Metrics]]:
        """Summaries by the values of the columns `evaluation.by`, where rows have more than one."""
        found = {}
        for column in self.settings.by:
            values = [_value(group.prompt.row, column) for group in self.groups]
            names = sorted({value for value in values if value is not None})
            if len(names) > 1 or (names and column != "source"):
                found[column] = {name: self._part(values, name) for name in names}
        return found

    def _part(self, values: Sequence[str | None], name: str) -> Metrics:
        scores = [group for group, value in zip(self.scores, values, strict=True) if value == name]
        return {**_summary(scores, self.settings.passing_score), "rows": float(len(scores))}


@dataclass(frozen=True)
class Evaluation:
    """Results of every held-out set, and `losses`: mean negative log-likelihood of the targets, by set."""

    sets: Sequence[SetResult] = ()
    losses: Mapping[str, Metrics] = field(default_factory=dict)

    @property
    def scores(self) -> list[list[Score]]:
        return [scores for one in self.sets for scores in one.scores]

    def metrics(self) -> Metrics:
        """`eval/...` of the only set; of several, `eval/<set>/...`, and the score and accuracy over all their rows."""
        found: Metrics = {}
        for one in self.sets:
            prefix = _prefix(one.name)
            found |= {f"{prefix}/{name}": value for name, value in one.metrics().items()}
            for column, parts in one.parts().items():
                found |= {f"{prefix}/{column}/{name}": part["accuracy"] for name, part in parts.items() if "accuracy" in part}
        for name, losses in self.losses.items():
            found |= {f"{_prefix(name)}/{key}": value for key, value in losses.items()}
        if len(self.sets) > 1:
            found |= {f"eval/{name}": value for name, value in self._over_all().items()}
        return found

    def report(self, step: int) -> dict[str, Any]:
        """Content of eval.json."""
        sets: dict[str, Any] = {one.name: {**one.metrics(), "by": one.parts()} for one in self.sets}
        for name, losses in self.losses.items():
            sets[name] = {**sets.get(name, {}), **losses}
        return {"step": step, "sets": sets}

    def write(self, folder: Path, step: int) -> None:
        """Write eval.json, atomically."""
        draft = folder / ".eval.json.partial"
        draft.write_text(json.dumps(self.report(step), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(draft, folder / "eval.json")

    def _over_all(self) -> Metrics:
        summaries = [_summary([scores], one.settings.passing_score) for one in self.sets for scores in one.scores]
        return {
            name: fmean(values) for name in ("score", "accuracy") if (values := [s[name] for s in summaries if name in s])
        } | {"rows": float(len(summaries))}  # fmt: skip


def evaluate(
    placement: Placement, reward: Scorer, held_out: Mapping[str, Encoded[Prompt]], config: RunConfig
) -> list[SetResult]:
    """Sample and score every row of every held-out set once, each set under its own sampling settings. The engines serve the
    weights they have."""
    results = []
    for name, settings in config.evaluation_sets.items():
        prompts = placement.encoder.embed(held_out[name]) if placement.encoder else held_out[name]
        drawn = placement.rollout.stream(prompts, sampling(settings, settings.samples, EVALUATION_SEED))
        scored = scored_in_order(drawn, reward)
        results.append(SetResult(name, settings, scored.groups, scored.scores, held_out[name].dropped_long))
    return results


def pass_at(k: int, samples: int, passed: int) -> float:
    """Probability that at least one of k samples passes, estimated without bias from `samples` of which `passed` did (Chen et
    al., arXiv 2107.03374)."""
    return 1 - comb(samples - passed, k) / comb(samples, k)


def _prefix(name: str) -> str:
    return "eval" if name == ONLY else f"eval/{name}"


def _summary(scores: Sequence[Sequence[Score]], passing: float) -> Metrics:
    """Means over the rows that have a score."""
    rows = [values for group in scores if (values := [score.value for score in group if score.value is not None])]
    if not rows:
        return {}
    return {
        "score": fmean(map(fmean, rows)),
        "accuracy": fmean(fmean(_passes(value, passing) for value in values) for values in rows),
    }


def _pass_at(scores: Sequence[Sequence[Score]], settings: EvaluationConfig) -> Metrics:
    """pass@k for k = 1, 2, 4, ... and the number of samples n, and avg@n, over the rows whose n samples all have a score."""
    samples, rows = settings.samples, []
    for group in scores:
        values = [score.value for score in group if score.value is not None]
        rows += [sum(_passes(value, settings.passing_score) for value in values)] if len(values) == samples else []
    if samples == 1 or not rows:
        return {}
    sizes = [2**power for power in range(samples.bit_length()) if 2**power < samples] + [samples]
    estimates = {f"pass@{k}": fmean(pass_at(k, samples, passed) for passed in rows) for k in sizes}
    return {f"avg@{samples}": fmean(passed / samples for passed in rows), **estimates}


def _passes(value: float, passing: float) -> bool:
    return value >= passing - 1e-9  # weighted sums of rewards are not exact


def _value(row: Row, column: str) -> str | None:
    value = row.source if column == "source" else row.fields.get(column)
    return None if value is None or value == "" else str(value)
