"""Plans the memory of run files that differ in settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlcore.config.schema import RunConfig
from rlcore.device import Backend
from rlcore.model.resolved import ResolvedModel
from rlcore.plan.footprint import META
from rlcore.plan.memory import Facts, Geometry, PoolPlan, memory_plan
from rlcore.plan.shapes import Shapes, command_of, images_of
from rlcore.runtime import jemalloc
from rlcore.runtime.memory import peak_rss
from rlcore.types import Prompt


class MemoryPlanner:
    """Geometry, facts and plan of run files on one kind of device."""

    def __init__(self, backend: Backend, prompts: Sequence[Prompt], device: int | None) -> None:
        """`prompts`: some of the run's, of whose images the largest counts. `device`: bytes of a device, if known."""
        self._process = resident()  # before anything is counted
        self._shapes, self._device = Shapes(backend, images_of(prompts)), device

    def geometry(self, config: RunConfig, both: bool = False) -> Geometry:
        return self._shapes.of(config, command_of(config), both)

    def facts(self, config: RunConfig, backend: Backend) -> Facts:
        name = backend.default_engine if config.rollout.engine == "auto" else config.rollout.engine
        settings = ResolvedModel(config, backend, META).settings
        return Facts(
            backend.own_memory, backend.engine_memory(name, config.rollout.options), self._device,
            settings.compute_dtype.itemsize, settings.tile_bytes, self._process,
            keeps=not backend.own_memory and jemalloc.of_malloc() is None,
        )  # fmt: skip

    def plan(self, config: RunConfig, geometry: Geometry, facts: Facts) -> list[PoolPlan]:
        return memory_plan(config, command_of(config), geometry, facts)


def resident() -> int:
    """Resident bytes of this process: an interpreter with torch, transformers, a tokenizer and the run's rows."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_rss()
    return 1024 * int(status.read_text().partition("VmRSS:")[2].split()[0])
