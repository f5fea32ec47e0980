"""The clock that times stages, and the timing metrics made of its spans (docs/metrics.md)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rlcore.monitor.heartbeat import Heartbeat
from rlcore.types import Metrics

OUTSIDE_ITERATION = ("save_checkpoint", "evaluate")  # timed, but no part of timing/all
NON_OVERLAP = ("reference_model", "adv", "reward")


@dataclass(frozen=True)
class Span:
    """One worker was busy with one stage from `start` to `end`, in seconds of one clock."""

    stage: str
    start: float
    end: float
    worker: int = 0


class Clock:
    """Collects spans of this process."""

    def __init__(self, heartbeat: Heartbeat | None = None, finish: Callable[[], object] = lambda: None) -> None:
        """`heartbeat`: notified of the stages; `finish`: synchronizes the device, whose pending work belongs to the span."""
        self.spans: list[Span] = []
        self.heartbeat, self._finish = heartbeat or Heartbeat(), finish

    @contextmanager
    def span(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with self.heartbeat.stage(stage):
                yield
                self._finish()
        finally:
            self.spans.append(Span(stage, start, time.perf_counter()))

    def take(self) -> list[Span]:
        """The spans since the last call. Other threads may go on recording."""
        spans = self.spans[:]
        del self.spans[: len(spans)]
        return spans


def timings(spans: Sequence[Span], start: float, end: float, beside: Sequence[Span] = ()) -> Metrics:
    """Compute `timing/*`, in seconds, of an iteration from `start` to `end`; `beside`: spans of another one that overlap it.

    `timing/<stage>`: the slowest worker's total. `timing/all`: the iteration without checkpointing and evaluation.
    `timing/non_overlap_<stage>`: the part of that stage that no other stage covers. `timing/other`: `all` minus the union
    of all spans, never negative. If a stage began in the previous iteration, as sampling ahead does, `timing/<stage>` counts
    all of it, the other two only its part in this iteration, where sampling for the next one covers time as well.
    """
    outside = [span for span in spans if span.stage in OUTSIDE_ITERATION]
    inside = [_from(start, span) for span in spans if span.stage not in OUTSIDE_ITERATION]
    others = [_from(start, span) for span in beside]
    result: Metrics = {"timing/all": end - start - _union(outside)}
    for stage in dict.fromkeys(span.stage for span in spans):
        by_worker: dict[int, float] = {}
        for span in spans:
            if span.stage == stage:
                by_worker[span.worker] = by_worker.get(span.worker, 0.0) + span.end - span.start
        result[f"timing/{stage}"] = max(by_worker.values())
    for stage in NON_OVERLAP:
        if any(span.stage == stage for span in inside):
            rest = [span for span in inside if span.stage != stage]
            result[f"timing/non_overlap_{stage}"] = _union(inside + others) - _union(rest + others)
    result["timing/other"] = max(0.0, end - start - _union(inside + others + outside))
    return result


def _from(start: float, span: Span) -> Span:
    """Clip the span to its part after `start`."""
    return replace(span, start=max(span.start, start), end=max(span.end, start))


def _union(spans: Iterable[Span]) -> float:
    """Seconds covered by at least one span."""
    total, reached = 0.0, -float("inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total
