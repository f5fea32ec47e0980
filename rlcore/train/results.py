"""Results of an evaluation: what each number is, by held-out set and by the values of columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from math import comb, isfinite
from statistics import fmean
from typing import Any, NamedTuple

from rlcore.config.sections import ONLY, EvaluationConfig
from rlcore.errors import ConfigError, nearest
from rlcore.types import Group, Metrics, Row, Score

_IF_THERE = ("source", "level")  # of `evaluation.by`: rows may lack them
_SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "samples", "passing_score")


class Columns:
    """Looks for the columns `evaluation.by` in the rows that are read."""

    def __init__(self, by: Sequence[str]) -> None:
        self._missing = [column for column in by if column not in _IF_THERE]
        self._there: dict[str, None] = {}

    def see(self, row: Row) -> None:
        self._missing = [column for column in self._missing if column_value(row, column) is None]
        self._there |= dict.fromkeys(row.fields)

    def refuse_missing(self) -> None:
        """ConfigError for a column that no row has."""
        if self._missing:
            hint = nearest(self._missing[0], list(self._there))
            raise ConfigError(f"evaluation.by: no held-out row has a text or number in a column {self._missing[0]!r}{hint}")


class RowResult(NamedTuple):
    """One row's samples, scored."""

    row: Row
    scores: list[float]  # of the samples that have one
    passed: int  # number of those that pass
    failed: int  # samples whose reward failed
    lengths: list[int]  # response tokens of every sample
    cut: int  # samples cut off at max_new_tokens


@dataclass(frozen=True)
class SetResult:
    """Samples and scores of one held-out set."""

    name: str
    settings: EvaluationConfig
    groups: Sequence[Group]
    scores: Sequence[Sequence[Score]]
    dropped_long: int  # rows dropped because their prompt is too long

    @cached_property
    def rows(self) -> list[RowResult]:
        passing = self.settings.passing_score
        return [_row(group, scores, passing) for group, scores in zip(self.groups, self.scores, strict=True)]

    def metrics(self) -> Metrics:
        return {
            **summary(self.rows), **_pass_at(self.rows, self.settings.samples), "dropped_long": float(self.dropped_long),
        }  # fmt: skip

    def parts(self) -> dict[str, dict[str, Metrics]]:
        """Summaries by the values of the columns `evaluation.by` that rows have; by source only where there are several."""
        found = {}
        for column in self.settings.by:
            values = [column_value(one.row, column) for one in self.rows]
            names = sorted({value for value in values if value is not None})
            if len(names) > 1 or (names and column != "source"):
                chosen = {name: [one for one, value in zip(self.rows, values, strict=True) if value == name] for name in names}
                found[column] = {name: summary(rows) for name, rows in chosen.items()}
        return found

    def report(self) -> dict[str, Any]:
        """This set's part of eval.json."""
        settings = {name: getattr(self.settings, name) for name in _SAMPLING}
        return {"settings": settings, **self.metrics(), "by": self.parts()}


@dataclass(frozen=True)
class Evaluation:
    """Results of every held-out set: of sampled responses, and `losses` on the targets by set."""

    sets: Sequence[SetResult] = ()
    losses: Mapping[str, Metrics] = field(default_factory=dict)  # loss, loss_tokens, loss_rows, dropped_long

    @property
    def scores(self) -> list[Sequence[Score]]:
        return [scores for one in self.sets for scores in one.scores]

    def metrics(self) -> Metrics:
        """`eval/...` of the only set; of named ones `eval/<set>/...`, and `eval/...` over all their rows."""
        found = {f"eval/{name}": value for name, value in self._over_all().items()}
        for one in self.sets:
            prefix = _prefix(one.name)
            found |= {f"{prefix}/{name}": value for name, value in one.metrics().items()}
            for column, parts in one.parts().items():
                for value, part in parts.items():
                    found |= {f"{prefix}/{column}/{value}/{name}": number for name, number in part.items()}
        for name, losses in self.losses.items():
            found |= {f"{_prefix(name)}/{key}": value for key, value in losses.items()}
        return found

    def report(self, step: int) -> dict[str, Any]:
        """Content of eval.json."""
        sets: dict[str, Any] = {one.name: one.report() for one in self.sets}
        for name, losses in self.losses.items():
            sets[name] = {**losses, **sets.get(name, {})}
        over_all = self._over_all()
        return {"step": step, "sets": sets, **({"all": over_all} if over_all else {})}

    def _over_all(self) -> Metrics:
        """Summary over all rows, and the mean loss over all tokens, where sets are named."""
        if {ONLY} >= {one.name for one in self.sets} | self.losses.keys():
            return {}
        rows = [row for one in self.sets for row in one.rows]
        dropped = [float(one.dropped_long) for one in self.sets] or [part["dropped_long"] for part in self.losses.values()]
        return {**(summary(rows) if rows else {}), **_mean_loss(list(self.losses.values())), "dropped_long": sum(dropped)}


def summary(rows: Sequence[RowResult]) -> Metrics:
    """Numbers of at least one row. `score`: the mean over rows of the row's mean score; `accuracy`: of the fraction of its
    samples that pass. A failed reward is no score: a row without any is in neither mean, and counts in `unscored`."""
    scored = [row for row in rows if row.scores]
    means: Metrics = {}
    if scored:
        means["score"] = fmean(fmean(row.scores) for row in scored)
        means["accuracy"] = fmean(row.passed / len(row.scores) for row in scored)
    samples = sum(len(row.lengths) for row in rows)
    return {
        **means,
        "rows": float(len(rows)),
        "unscored": float(len(rows) - len(scored)),
        "error": float(sum(row.failed for row in rows)),
        "response_length": sum(sum(row.lengths) for row in rows) / samples,
        "clip_ratio": sum(row.cut for row in rows) / samples,
    }


def pass_at(k: int, samples: int, passed: int) -> float:
    """Probability that at least one of k samples passes, estimated without bias from `samples` of which `passed` did (Chen et
    al., arXiv 2107.03374)."""
    return 1 - comb(samples - passed, k) / comb(samples, k)


def column_value(row: Row, column: str) -> str | None:
    """The text by which rows are told apart; None where the row has none, or something that is neither a text nor a number."""
    value = row.source if column == "source" else row.fields.get(column)
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        whole = isfinite(value) and value == int(value)  # 3.0, which tables make of 3 in a column with gaps, is 3
        return str(int(value)) if whole else str(value) if isfinite(value) else None
    return str(value) if isinstance(value, str | bool) and value != "" else None


def _row(group: Group, scores: Sequence[Score], passing: float) -> RowResult:
    values = [score.value for score in scores if score.value is not None]
    return RowResult(
        group.prompt.row, values, passed=sum(value >= passing - 1e-9 for value in values),  # weighted sums are not exact
        failed=len(scores) - len(values), lengths=[len(sample.token_ids) for sample in group.samples],
        cut=sum(sample.finish == "length" for sample in group.samples),
    )  # fmt: skip


def _pass_at(rows: Sequence[RowResult], samples: int) -> Metrics:
    """pass@k for k = 1, 2, 4, ... and n, and avg@n, the fraction of samples that pass, over the rows whose n samples all have
    a score. Empty for n = 1."""
    passed = [row.passed for row in rows if len(row.scores) == samples]
    if samples == 1 or not passed:
        return {}
    sizes = [2**power for power in range(samples.bit_length()) if 2**power < samples] + [samples]
    estimates = {f"pass@{k}": fmean(pass_at(k, samples, number) for number in passed) for k in sizes}
    return {f"avg@{samples}": fmean(number / samples for number in passed), **estimates}


def _mean_loss(losses: Sequence[Metrics]) -> Metrics:
    """Over the tokens of several sets."""
    if not losses:
        return {}
    totals = {name: sum(part[name] for part in losses) for name in ("loss_tokens", "loss_rows")}
    return {"loss": sum(part["loss"] * part["loss_tokens"] for part in losses) / totals["loss_tokens"], **totals}


def _prefix(name: str) -> str:
    return "eval" if name == ONLY else f"eval/{name}"
