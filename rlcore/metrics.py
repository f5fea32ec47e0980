"""Every metric's one definition (docs/metrics.md), the clock that times stages, and where the numbers go.

Stages record spans; `timings` turns spans into `timing/*`. Names and definitions follow the table of MindSpeed-RL where
they agree with what they say; the rest is defined here.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlcore import jemalloc
from rlcore.algorithms import dapo
from rlcore.errors import RunError
from rlcore.pulse import Pulse
from rlcore.types import Group, Metrics, Receipt, Score

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

    def __init__(self, pulse: Pulse | None = None, finish: Callable[[], object] = lambda: None) -> None:
        """`pulse`: is told of the stages; `finish` waits for what a device still does, which belongs to the span."""
        self.spans: list[Span] = []
        self.pulse, self._finish = pulse or Pulse(), finish

    @contextmanager
    def span(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with self.pulse.stage(stage):
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
    """`timing/*` in seconds of an iteration from `start` to `end`; `beside` are spans of another one that lie in this one too.

    `timing/<stage>`: the slowest worker's total. `timing/all`: the iteration without checkpointing and evaluation.
    `timing/non_overlap_<stage>`: the part of that stage that no other stage covers. `timing/other`: `all` minus the union
    of all spans, never negative. Of a stage that began in the iteration before, as sampling ahead does, `timing/<stage>` is the
    whole, and the other two are what lies in this one, where the sampling for the next one covers time as well.
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


def throughput(groups: Sequence[Group], timing: Metrics, devices: int) -> Metrics:
    """Tokens a second. `e2e_tps`, `update_tps`, `vllm_tps`: prompt and response tokens of all samples, a device, over
    `timing/all`, `update`, `rollout`. `decode_tps`: response tokens a device over `rollout`. `tps_throughput`: all tokens over
    `timing/all`, the whole cluster."""
    response = sum(len(sample.token_ids) for group in groups for sample in group.samples)
    tokens = response + sum(len(group.prompt.token_ids) * len(group.samples) for group in groups)
    rates = {
        "e2e_tps": tokens / devices / timing["timing/all"],
        "tps_throughput": tokens / timing["timing/all"],
    }
    if "timing/update" in timing:
        rates["update_tps"] = tokens / devices / timing["timing/update"]
    if "timing/rollout" in timing:
        rates["vllm_tps"] = tokens / devices / timing["timing/rollout"]
        rates["decode_tps"] = response / devices / timing["timing/rollout"]
    return rates


def spread(name: str, values: Iterable[float]) -> Metrics:
    """`name/mean`, `name/max`, `name/min`; nothing of no values."""
    values = list(values)
    if not values:
        return {}
    return {f"{name}/mean": statistics.fmean(values), f"{name}/max": max(values), f"{name}/min": min(values)}


def lengths(groups: Sequence[Group]) -> Metrics:
    """Tokens: `prompt_length/*` over prompts, `response_length/*` over samples, and the share cut off at the limit."""
    samples = [sample for group in groups for sample in group.samples]
    return {
        **spread("response_length", (len(sample.token_ids) for sample in samples)),
        **spread("prompt_length", (len(group.prompt.token_ids) for group in groups)),
        "response_length/clip_ratio": sum(sample.finish == "length" for sample in samples) / len(samples),
    }


def images(groups: Sequence[Group]) -> Metrics:
    """`vision/images_encoded`: the images of all prompts, each of which the vision encoder has read once."""
    shown = [group.prompt.vision for group in groups if group.prompt.vision is not None]
    return {"vision/images_encoded": float(sum(len(vision["image_grid_thw"]) for vision in shown))}


def score_metrics(scores: Sequence[Sequence[Score]]) -> Metrics:
    """`grpo/score/*` over samples that have a value, `reward/<part>` each reward's mean, `reward/{timeout,error}` counts,
    and the share of groups that have no two scores that differ."""
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


def sync(receipt: Receipt) -> Metrics:
    """`sync/{bytes,seconds,check_seconds}` of a weight update, the last being the share spent on its receipt."""
    return {
        "sync/bytes": float(receipt.bytes), "sync/seconds": receipt.seconds, "sync/check_seconds": receipt.check_seconds,
    }  # fmt: skip


def memory(device: torch.device | None = None) -> Metrics:
    """`memory/peak_rss_gib`: the most memory this process has held so far. `memory/peak_device_gib`: the most that torch has
    held on a device with memory of its own. `memory/host_*`: what its malloc holds now, where that is jemalloc. All GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    metrics = {"memory/peak_rss_gib": peak / 2**20}
    if device is not None and device.type != "cpu":
        metrics["memory/peak_device_gib"] = torch.get_device_module(device).max_memory_allocated(device) / 2**30
    allocator = jemalloc.of_malloc()
    stats = allocator.stats() if allocator else None
    held = {f"memory/host_{name}": size / 2**30 for name, size in asdict(stats).items()} if stats else {}
    return metrics | held


class Sinks:
    """Writes each step's metrics to `metrics.jsonl`, the samples to `samples.jsonl`, and both means to TensorBoard."""

    def __init__(self, folder: Path, tensorboard: bool, first_step: int = 0) -> None:
        """`first_step` is the first that will be written: what an interrupted run wrote from there on is dropped."""
        self.folder = folder
        for name in ("metrics.jsonl", "samples.jsonl"):
            _keep_before(folder / name, first_step)
        self.metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.samples = (folder / "samples.jsonl").open("a", encoding="utf-8")
        self.tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

    def write(self, step: int, metrics: Metrics, samples: Iterable[Mapping[str, Any]] = ()) -> None:
        """RunError when there is no room."""
        with self._writing(f"step {step}"):
            self.samples.writelines(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n" for sample in samples)
            self.samples.flush()
            self.metrics.write(json.dumps({"step": step, **metrics}) + "\n")
            self.metrics.flush()
            if self.tensorboard is not None:
                for name, value in metrics.items():
                    self.tensorboard.add_scalar(name, value, step)
                self.tensorboard.flush()

    def close(self) -> None:
        with self._writing("the last lines"), ExitStack() as closing:
            for sink in (self.metrics, self.samples, self.tensorboard):
                if sink is not None:
                    closing.callback(sink.close)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.folder}: {what} cannot be written: {error}; free some room, then go on with --resume from the last"
                " checkpoint"
            ) from error


def _keep_before(path: Path, step: int) -> None:
    """Drop the lines of this step and later ones, and a line that was cut off."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)  # bytes: text also splits at U+2028 and the like, which samples hold
    draft = path.with_name(f".{path.name}.partial")
    draft.write_bytes(b"".join(line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] < step))
    os.replace(draft, path)


def _from(start: float, span: Span) -> Span:
    """What lies after `start`."""
    return replace(span, start=max(span.start, start), end=max(span.end, start))


def _union(spans: Iterable[Span]) -> float:
    """Seconds covered by at least one span."""
    total, reached = 0.0, -float("inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total
