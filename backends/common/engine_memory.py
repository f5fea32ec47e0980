"""vLLM's memory as its arguments say it, without starting it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlcore.device import Backend, EngineMemory

_SIZE, _SHARE = "kv_cache_memory_bytes", "gpu_memory_utilization"
_PROCESS = 380 * 2**20  # host memory of vLLM 0.32: imports, compiled operators, the state of an engine


def of(backend: Backend, engine: str, options: Mapping[str, Any]) -> EngineMemory | None:
    """`options`: of the run file; they override the backend's. A size of the cache overrides the share of the device."""
    if engine != "vllm":
        return None
    arguments = {**backend.engine_options(engine), **options}
    sleeps = (getattr(backend.options, "sleep_level", 0) or 1) if arguments.get("enable_sleep_mode") else 0
    size = arguments.get(_SIZE)
    name, now = (_SIZE, size) if size else (_SHARE, arguments[_SHARE])
    key = f"rollout.options.{name}"
    if name not in options and (option := backend.engine_memory_option):
        key, now = f"backend.options.{option}", getattr(backend.options, option)
    return EngineMemory(key, float(now), int(size) if size else None, sleeps, _PROCESS)
