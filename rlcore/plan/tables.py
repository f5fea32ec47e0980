"""Memory plans as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from rlcore.config.schema import RunConfig
from rlcore.plan.memory import Facts, Item, PhasePlan, PoolPlan

GIB = 2**30
_ORDER = (
    "device runtime", "process", "weights while loading", "parameters", "working copy", "moments", "gradients", "reference",
    "vision encoder", "engine weights", "engine cache", "sampled logits", "weights on their way to engines",
    "gathered layers", "gradients of a layer", "activations", "vision activations",
    "logits tile", "image embeddings",
)  # fmt: skip


def tables(plans: Sequence[PoolPlan], config: RunConfig, facts: Facts) -> str:
    """A table per pool for its devices and, where these have memory of their own, one for its processes' host memory."""
    return "\n".join(line for plan in plans for line in _pool(plan, config, facts))


def _pool(plan: PoolPlan, config: RunConfig, facts: Facts) -> Iterator[str]:
    setting, count, roles = plan.shape
    whose = f"each of {count} devices" if count > 1 else "the device"
    title = f"memory of {whose}" if facts.own_memory else f"memory of {_process(whose)}"
    named = f"{title} ({setting}: {', '.join(sorted(roles))}), GiB; ~ is an estimate"
    yield from ("", named, *_table(plan.phases, lambda phase: phase.device))
    yield from _notes(plan, config, facts)
    if facts.own_memory:
        host = plan.host_peak
        yield from ("", f"host memory of {_process(whose)}, GiB")
        yield from _table(plan.phases, lambda phase: phase.host)
        whole = f"; {count} processes, {gib(count * host.host_total)}" if count > 1 else ""
        yield f"host peak: {host.name}, {gib(host.host_total)} a process{whole}"


def _process(whose: str) -> str:
    return whose.replace("devices", "processes").replace("device", "process")


def _notes(plan: PoolPlan, config: RunConfig, facts: Facts) -> Iterator[str]:
    count, peak = plan.shape.devices, plan.peak
    together = f"; {count} processes, {gib(count * peak.total)}" if count > 1 and not facts.own_memory else ""
    yield f"peak: {peak.name}, {gib(peak.total)}{together}"
    if plan.update_otherwise:
        used = config.train.gradient_checkpointing
        here = sum(item.bytes for phase in plan.phases if phase.name == "train" for item in phase.device
                   if item.what in ("activations", "logits tile"))  # fmt: skip
        ways = {used: here, not used: plan.update_otherwise}
        said = f"{gib(ways[True])} with train.gradient_checkpointing, {gib(ways[False])} without"
        yield f"activations of an update, logits tile included: {said}"
    if facts.engine and facts.engine.cache is None and facts.device is None and "rollout" in plan.shape.roles:
        share = f"{facts.engine.key} {facts.engine.now:g} of a device"
        yield f"the engine's cache is not counted: it takes what {share} leaves beside the weights; give --device-gib"


def _table(phases: Sequence[PhasePlan], items: Callable[[PhasePlan], Sequence[Item]]) -> Iterator[str]:
    """Rows are parts, columns are phases; the last column has the keys that decide a part."""
    found: dict[str, Item] = {item.what: item for phase in phases for item in items(phase)}
    order = sorted(found, key=lambda what: (_ORDER.index(what) if what in _ORDER else len(_ORDER), what))
    by_phase: list[Mapping[str, int]] = [{item.what: item.bytes for item in items(phase)} for phase in phases]
    rows = [["", *(phase.name for phase in phases), "decided by"]]
    for what in order:
        mark = "" if found[what].exact else "~ "
        rows.append([mark + what, *(_cell(sizes.get(what, 0)) for sizes in by_phase), found[what].keys])
    rows.append(["in all", *(_cell(sum(sizes.values())) for sizes in by_phase), ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True))]
        yield "  ".join([*cells, row[-1]]).rstrip()


def _cell(size: int) -> str:
    return "-" if not size else f"{size / GIB:.3f}" if size < GIB / 10 else f"{size / GIB:.2f}"


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
