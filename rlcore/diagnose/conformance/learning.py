"""Learning section: a small run, started as a user would, must raise its score."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from rlcore.diagnose.conformance.measurement import Measurement
from rlcore.diagnose.conformance.section import Setup
from rlcore.monitor.console import Console
from rlcore.train import grpo


def digits(response: str, answer: str, fields: Mapping[str, Any]) -> float:
    """Reward: the share of digits in the response."""
    return sum(character.isdigit() for character in response) / max(len(response), 1)


def measure(setup: Setup) -> Iterator[Measurement]:
    run = setup.folder / "run"
    run.mkdir()
    grpo.train(setup.config, setup.backend, run, resume=False, console=Console(0), begin=lambda: None)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = [row["grpo/score/mean"] for row in rows]
    rise = fmean(scores[-3:]) - fmean(scores[:3])
    yield Measurement("score: what the last three steps have over the first three", rise, 0.2, at_least=True)
    yield Measurement("mismatch/mean of the worst step", max(row["mismatch/mean"] for row in rows), 0.05)
    yield Measurement("samples whose reward failed", sum(row["reward/error"] + row["reward/timeout"] for row in rows))
