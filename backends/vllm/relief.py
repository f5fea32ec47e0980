"""What vLLM's complaints about memory mean for a run file: which setting, from what, to what.

vLLM answers a shortage with `gpu_memory_utilization`, up or down. Up is right where its share leaves no room for the cache, and
wrong where an allocation failed: in a worker the other roles have the rest of the device. On the CPU the cache's size is set.
The messages are those of vLLM 0.32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlcore.device import Backend
from rlcore.errors import Remedy, Shortage

if TYPE_CHECKING:
    from vllm import LLM

_GIB = 2**30
_MOST, _LEAST, _STEP = 0.95, 0.2, 0.1  # of a device's memory, for the engine
_SIZE, _SHARE = "kv_cache_memory_bytes", "gpu_memory_utilization"
_NO_BLOCKS = re.compile(r"No available memory for the cache blocks|memory for kv \((?:-[\d.]+|0\.0)/")
_TOO_LONG = re.compile(
    r"max seq len \((?P<wanted>\d+)\), \((?P<needed>[\d.]+) GiB KV cache is needed, which is larger than the available KV cache"
    r" memory \((?P<there>[\d.]+) GiB\)(?:.*estimated maximum model length is (?P<fits>\d+))?"
)
_TAKEN = re.compile(r"\((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on (?:startup is less than desired|kv cache allocation)")

_ADVICE = re.compile(r" (?=Try |Decrease |Reduce |Increase |On the CPU backend|See )")  # vLLM's own


@dataclass(frozen=True)
class MemorySetting:
    """The setting that is the engine's memory."""

    key: str
    now: float
    unit: float | None  # bytes of 1; None: `now` is a fraction of the device's memory

    def remedy(self, to: float, why: str) -> Remedy:
        to = int(to) if self.unit == 1 else float(f"{to:.4g}")
        return Remedy((f"{self.key}={to}",), f"{self.now:g}" if self.unit != 1 else f"{self.now}", why)


class Relief:
    """Remedies for an engine started with these arguments."""

    def __init__(self, arguments: Mapping[str, Any], options: Mapping[str, Any], backend: Backend, max_tokens: int) -> None:
        """`options`: those of `arguments` that the run file sets (rollout.options)."""
        self.arguments, self.options, self.backend, self.max_tokens = arguments, options, backend, max_tokens

    def refused(self, error: ValueError) -> Shortage | None:
        """What vLLM lacked when it refused to start; None if it was not memory."""
        said = " ".join(str(error).split())
        fits, found = 0, list[Remedy]()
        if _NO_BLOCKS.search(said):
            found = [*self._started()]
        elif long := _TOO_LONG.search(said):
            fits = int(long["fits"] or 0)
            found = [*self._lengths(int(long["wanted"])), *self._longer(long, fits)]
        elif taken := _TAKEN.search(said):
            found = [*self._lowered(taken)]
        else:
            return None
        memory = "host" if self.backend.device(0).type == "cpu" else "device"
        return Shortage("start_engine", memory, _ADVICE.split(said)[0], fits=fits, relief=tuple(found))

    def savings(self, llm: LLM | None = None) -> Sequence[Remedy]:
        """Settings with which it would need less, after an allocation failed; `llm`, once started, knows its own choices."""
        chosen: dict[str, Any] = {}
        if llm is not None:
            settings = llm.llm_engine.vllm_config
            chosen = {
                "max_num_seqs": settings.scheduler_config.max_num_seqs, "enforce_eager": settings.model_config.enforce_eager,
            }  # fmt: skip
        return [*self._less(llm), *self._smaller(chosen)]

    @property
    def memory(self) -> MemorySetting:
        """A cache size overrides the fraction, and rollout.options the backend's."""
        size = self.arguments.get(_SIZE)
        name = _SIZE if size else _SHARE
        from_backend = name in self.backend.engine_options("vllm") and name not in self.options
        if from_backend and (option := self.backend.engine_memory_option):
            now = getattr(self.backend.options, option)
            return MemorySetting(f"backend.options.{option}", now, size / now if size else None)
        from vllm import EngineArgs

        now = size or self.arguments.get(_SHARE) or EngineArgs.gpu_memory_utilization
        return MemorySetting(f"rollout.options.{name}", now, 1.0 if size else None)

    def _started(self) -> Iterator[Remedy]:
        """Room for some cache at all."""
        if unit := self.memory.unit:
            yield self.memory.remedy(max(2 * self.memory.now, _GIB / unit), "the cache has no room for a single block")
            return
        yield from self._raised(self.memory.now + _STEP, "weights and activations take the engine's whole share of the device")
        yield from self._smaller({})

    def _raised(self, share: float, why: str) -> Iterator[Remedy]:
        """A larger share of the device, at most _MOST."""
        if self.memory.now < _MOST:
            limit = f"at most {_MOST}, and the worker's other roles need the rest"
            yield self.memory.remedy(min(_MOST, share), f"{why}; {limit}")

    def _longer(self, long: re.Match[str], fits: int) -> Iterator[Remedy]:
        """Room for one sample; vLLM rounds to hundredths of a GiB, so that a small cache is scaled by the lengths instead."""
        memory, wanted = self.memory, int(long["wanted"])
        needed, there = float(long["needed"]), float(long["there"])
        why = f"one sample of {wanted} tokens needs {long['needed']} GiB of cache, of which there are {long['there']}"
        if memory.unit:
            to = (needed + 0.01) * _GIB / memory.unit if needed > there else memory.now * (1.01 * wanted / fits if fits else 2)
            yield memory.remedy(to, why)
            return
        total = self._total()
        share = memory.now + ((needed - there + 0.01) / total if total else _STEP)
        if share <= _MOST:
            yield from self._raised(_up(share), why)

    def _lengths(self, wanted: int) -> Iterator[Remedy]:
        if wanted > self.max_tokens:
            why = "no sample is longer: that is data.max_prompt_tokens + max_new_tokens"
            yield Remedy((f"rollout.options.max_model_len={self.max_tokens}",), str(wanted), why)

    def _lowered(self, taken: re.Match[str]) -> Iterator[Remedy]:
        """As much as was free when it started."""
        free, total, memory = float(taken["free"]), float(taken["total"]), self.memory
        to = 0.9 * free * _GIB / memory.unit if memory.unit else _down(free / total - 0.01)
        if (0 if memory.unit else _LEAST) < to < memory.now:
            why = f"{free:g} of {total:g} GiB were free when the engine started: the worker's other roles, or other processes,"
            yield memory.remedy(to, f"{why} hold the rest")

    def _less(self, llm: LLM | None) -> Iterator[Remedy]:
        memory, why = self.memory, "the engine takes it whole for its cache, whatever the other roles need at that moment"
        if memory.unit:
            if memory.now * memory.unit >= _GIB / 2 if llm is None else _halved(llm) >= self.max_tokens:
                yield memory.remedy(memory.now / 2, why)
        elif memory.now > _LEAST:
            yield memory.remedy(max(_LEAST, memory.now - _STEP), why)

    def _smaller(self, chosen: Mapping[str, Any]) -> Iterator[Remedy]:
        settings = {**chosen, **{name: value for name, value in self.arguments.items() if value is not None}}
        sequences = settings.get("max_num_seqs")
        if sequences is None or sequences > 16:
            now = "vLLM's default, 256 or more" if sequences is None else str(sequences)
            why = "logits and activations grow with the samples that are decoded at a time"
            yield Remedy((f"rollout.options.max_num_seqs={(sequences or 256) // 2}",), now, why)
        if not settings.get("enforce_eager"):
            yield Remedy(("rollout.options.enforce_eager=true",), "false", "recorded graphs hold memory of their own; slower")

    def _total(self) -> float | None:
        memory = self.backend.free_memory()
        return memory[1] / _GIB if memory else None


def _halved(llm: LLM) -> int:
    """Tokens for which half of the engine's cache has room."""
    cache = llm.llm_engine.vllm_config.cache_config
    return (cache.num_gpu_blocks or 0) * cache.block_size // 2


def _up(share: float) -> float:
    return math.ceil(share * 100) / 100


def _down(share: float) -> float:
    return math.floor(share * 100) / 100
