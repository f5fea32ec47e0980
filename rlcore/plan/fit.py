"""What of a memory plan does not fit a device, and which settings help: each is tried on the plan before it is advised."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rlcore.config import loader
from rlcore.config.schema import RunConfig
from rlcore.device import Backend
from rlcore.diagnose.remedies import Case, changed, remedies
from rlcore.errors import Remedy, Shortage
from rlcore.model.loading import query_heads, resolve
from rlcore.model.resolved import MODEL_CACHE
from rlcore.plan.memory import Facts, Geometry, PhasePlan, PoolPlan
from rlcore.plan.planner import MemoryPlanner
from rlcore.plan.tables import gib

_STAGES = {
    "load": "load", "start": "start_engine", "reshard": "sync", "send": "send", "encode": "embed", "infer": "generate",
    "reference": "reference_logprobs", "score": "logprobs", "train": "update", "save": "save",
}  # fmt: skip
_PARTS = {
    "parameters": "parameters", "working copy": "parameters", "moments": "optimizer", "reference": "reference",
    "engine weights": "engine", "engine cache": "engine", "vision encoder": "vision",
}  # fmt: skip
_LEAST = 0.005  # of a device, that a setting must save to be advised
_MOST = 12  # settings advised together


@dataclass(frozen=True)
class Planned:
    """A run file and its plan."""

    config: RunConfig
    backend: Backend
    facts: Facts
    geometry: Geometry
    pools: list[PoolPlan]

    def over(self, size: int) -> tuple[PoolPlan, PhasePlan] | None:
        """Pool and phase that are furthest above `size` bytes; None if all fit."""
        pool, phase = max(((pool, phase) for pool in self.pools for phase in pool.phases), key=lambda one: one[1].total)
        return (pool, phase) if phase.total > size else None

    def total(self, pool: PoolPlan, phase: str) -> int:
        """Bytes of that phase in the same pool of this plan."""
        return max((one.total for mine in self.pools if mine.shape.setting == pool.shape.setting
                    for one in mine.phases if one.name == phase), default=0)  # fmt: skip


@dataclass(frozen=True)
class Advice:
    """A setting, and the phase for which it helps before and after."""

    remedy: Remedy
    phase: str
    before: int
    after: int
    then: Planned
    together: bool = False  # with those before it


def planned(planner: MemoryPlanner, config: RunConfig, backend: Backend, both: bool = False) -> Planned:
    geometry, facts = planner.geometry(config, both), planner.facts(config, backend)
    return Planned(config, backend, facts, geometry, planner.plan(config, geometry, facts))


def advice(planner: MemoryPlanner, start: Planned, size: int) -> list[Advice]:
    """Settings that help the phase that is furthest above `size` bytes, mildest first, up to one with which the run fits. If
    none does alone: settings to change together, until it fits or nothing helps."""
    alone = list[Advice]()
    for one in _helping(planner, start, size):
        alone.append(one)
        if one.then.over(size) is None:
            return alone
    together, now = list[Advice](), start
    while now.over(size) and len(together) < _MOST and (step := next(_helping(planner, now, size), None)):
        if together and together[-1].phase == step.phase and _keys(together[-1].remedy) == _keys(step.remedy):
            last = together.pop()  # a smaller value of what was just advised
            step = replace(step, before=last.before, remedy=replace(step.remedy, now=last.remedy.now))
        together.append(replace(step, together=True))
        now = step.then
    return together


def report(planner: MemoryPlanner, start: Planned, size: int) -> tuple[str, bool]:
    """Lines about a device of `size` bytes, and whether the run fits it."""
    wrong = [(pool, phase) for pool in start.pools for phase in pool.phases if phase.total > size]
    if not wrong:
        return f"fits {gib(size)} in every phase; what the allocator wastes is not counted", True
    lines = [f"does not fit {gib(size)}:"]
    for pool, phase in wrong:
        lines.append(f"  {phase.name} needs {gib(phase.total)}, {gib(phase.total - size)} too much ({pool.shape.setting})")
    found = advice(planner, start, size)
    for number, one in enumerate(found):
        word = ("and:  " if one.together else "or:   ") if number else "try:  "
        fits = ", and everything fits" if one.then.over(size) is None else ""
        lines.append(
            f"  {word}{shlex.join(one.remedy.overrides)} (now {one.remedy.now}): {one.phase} {gib(one.before)} ->"
            f" {gib(one.after)}{fits}; {one.remedy.why}"
        )
    if not found or found[-1].then.over(size):
        lines.append("  no setting of this run makes it fit: more or larger devices, or a smaller model")
    return "\n".join(lines), False


def _helping(planner: MemoryPlanner, now: Planned, size: int) -> Iterator[Advice]:
    """Remedies for the worst phase that lower it, each by its plan; more devices are left out."""
    over = now.over(size)
    assert over is not None, "asked where something does not fit"
    pool, phase = over
    for remedy in remedies(_case(now, pool, phase, size)):
        if remedy.hardware:
            continue
        config, kind = changed(now.config, remedy), type(now.backend)
        backend = kind(loader.validate(kind.Options, config.backend.options, "backend.options."))
        then = planned(planner, config, backend)
        after = then.total(pool, phase.name)
        if after < phase.total - _LEAST * size:
            yield Advice(remedy, phase.name, phase.total, after, then)


def _keys(remedy: Remedy) -> list[str]:
    return [override.partition("=")[0] for override in remedy.overrides]


def _case(now: Planned, pool: PoolPlan, phase: PhasePlan, size: int) -> Case:
    held: dict[str, int] = {}
    for item in phase.device:
        if part := _PARTS.get(item.what):
            held[part] = held.get(part, 0) + item.bytes
    shortage = Shortage(
        _STAGES[phase.name], "device" if now.facts.own_memory else "host", held=held, neighbours=pool.shape.devices,
        relief=tuple(_relief(now, phase, size)),
    )  # fmt: skip
    heads = query_heads(resolve(now.config.model, MODEL_CACHE, weights=False))
    return Case(shortage, now.config, now.backend, heads)


def _relief(now: Planned, phase: PhasePlan, size: int) -> Iterator[Remedy]:
    """Lower the engine's memory by what is missing, if that leaves room for a sample."""
    memory, held = now.facts.engine, {item.what: item.bytes for item in phase.device}
    if memory is None or "engine cache" not in held:
        return
    config = now.config
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    sample = longest * now.geometry.cache_width * now.facts.dtype // config.rollout.tensor_parallel
    cache = held["engine cache"] - (phase.total - size)
    if cache < sample:
        return
    if memory.cache is None:
        to = math.floor((cache + held["engine weights"]) / size * 100) / 100
    else:
        to = float(f"{cache / (memory.cache / memory.now):.3g}")
    yield Remedy((f"{memory.key}={to:g}",), f"{memory.now:g}", "the engine takes it whole, whatever else is on the device")
