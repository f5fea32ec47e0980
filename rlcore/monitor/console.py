"""Console output of a run: one line per step, a progress bar, and samples to read."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from rlcore.types import Group, Metrics, Score


class Console:
    """Lines on stdout; a progress bar on stderr when that is a terminal."""

    def __init__(self, samples: int = 0) -> None:
        self.samples = samples
        self.bar: tqdm[Any] | None = None

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def warn(self, line: str | None) -> None:
        if line:
            self.say(f"    warning: {line}")

    def start(self, what: str, steps: int, done: int = 0) -> None:
        self.bar = tqdm(
            total=steps, initial=done, desc=what, unit="step", leave=False, file=sys.stderr, disable=not sys.stderr.isatty()
        )

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def step(self, line: str, steps: int = 1) -> None:
        self.say(line)
        if self.bar is not None:
            self.bar.update(steps)

    def show(self, groups: Sequence[Group], scores: Sequence[Sequence[Score]]) -> None:
        """Print the best sample of each of the first groups, in full."""
        for group, group_scores in list(zip(groups, scores, strict=True))[: self.samples]:
            best = max(range(len(group_scores)), key=lambda i: _order(group_scores[i]))
            text = group.samples[best].text.strip().replace("\n", "\n    | ")
            row = group.prompt.row
            self.say(f"    {row.id} (answer {row.answer!r}, score {_shown(group_scores[best])})\n    | {text}")


def grpo_line(number: int, steps: int, numbers: Metrics) -> str:
    """Format a step's number, score, update metrics and stage times."""
    score = f"score {numbers['grpo/score/mean']:.3f}" if "grpo/score/mean" in numbers else "no score"
    parts = [f"step {number}/{steps}", score]
    if "eval/score" in numbers:
        parts.append(f"eval {numbers['eval/score']:.3f}")
    known = {
        "entropy": ("actor/entropy", ".2f"), "kl": ("actor/kl_loss", ".4f"), "kl in reward": ("actor/kl_penalty", ".4f"),
        "grad": ("grad_norm", ".3g"),
        "mismatch": ("mismatch/mean", ".1e"), "length": ("response_length/mean", ".0f"),
    }  # fmt: skip
    parts += [f"{label} {numbers[name]:{form}}" for label, (name, form) in known.items() if name in numbers]
    parts.append(f"{numbers['timing/all']:.1f} s")
    stages = ("resharding_to_infer", "rollout", "reward", "reference_model", "old_log_p", "update")
    took = {stage: numbers.get(f"timing/{stage}", 0) for stage in stages}
    times = " ".join(f"{stage} {seconds:.1f}" for stage, seconds in took.items() if seconds >= 0.05)
    return "  ".join(parts) + (f" ({times})" if times else "")


def evaluation_line(numbers: Metrics) -> str:
    """Format the metrics of an evaluation before training."""
    shown = {"score": ".3f", "accuracy": ".3f", "loss": ".4f"}
    parts = [f"{name} {numbers[f'eval/{name}']:{form}}" for name, form in shown.items() if f"eval/{name}" in numbers]
    rows = f" on {numbers['eval/rows']:.0f} rows" if "eval/rows" in numbers else ""
    return f"before training  eval {', '.join(parts) or 'without a score'}{rows}"


def sets_line(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the score, or the loss, of every held-out set."""
    known = [(name, one.get("score", one.get("loss"))) for name, one in sets.items()]
    return "  ".join(f"{name} {number:.3f}" for name, number in known if number is not None)


def evaluation_table(report: Mapping[str, Any]) -> str:
    """Format the content of eval.json: a line for each held-out set, for each value of its columns, and for all rows."""
    lines: list[tuple[str, Mapping[str, Any]]] = []
    for name, one in report["sets"].items():
        lines.append((name, one))
        parts = one.get("by", {}).items()
        lines += [(f"  {column} {value}", part) for column, values in parts for value, part in values.items()]
    lines += [("all", report["all"])] if "all" in report else []
    lines = [(name, {"rows": one.get("loss_rows"), **one}) for name, one in lines]
    known = dict.fromkeys(key for _, one in lines for key in one)
    repeated = [key for key in known if "@" in key]
    shown = [key for key in ("rows", "score", "accuracy", *repeated, *_TITLES) if key in known]
    table = [["held-out rows", *(_TITLES.get(key, key) for key in shown)]]
    table += [[name, *(_number(key, one.get(key)) for key in shown)] for name, one in lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in table)


_TITLES = {
    "loss": "loss", "response_length": "tokens", "clip_ratio": "cut off", "error": "failed", "dropped_long": "dropped",
}  # fmt: skip
_COUNTS = ("rows", "response_length", "error", "dropped_long")


def _number(key: str, value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if key in _COUNTS else f"{value:.4f}"


def _order(score: Score) -> float:
    return float("-inf") if score.value is None else score.value


def _shown(score: Score) -> str:
    return score.status if score.value is None else f"{score.value:.2f}"
