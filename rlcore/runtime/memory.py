"""Device-memory manager: each phase lists the parts it needs; other parts may be offloaded to host memory.

A part is offloaded by its storages: the bytes are copied to the host and the storage is resized to 0, so that every tensor,
view and shard on it remains the same object.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rlcore.distributed.world import part
from rlcore.errors import RunError
from rlcore.monitor.clock import Clock
from rlcore.runtime import jemalloc
from rlcore.types import Metrics

PHASES: dict[str, frozenset[str]] = {
    "encode": frozenset({"vision"}),
    "infer": frozenset({"engine"}),
    "reshard": frozenset({"parameters", "vision", "engine"}),
    "send": frozenset({"parameters", "vision"}),
    "reference": frozenset({"reference"}),
    "score": frozenset({"parameters"}),
    "train": frozenset({"parameters", "optimizer"}),
    "save": frozenset({"parameters", "optimizer", "vision"}),
}
"""Parts that each phase needs on the device. Gradients exist only inside `train`."""
CONCURRENT = frozenset({"encode"})
"""Phases that offload nothing: a vision tower is small, and other parts move in the phases around it."""
MOVES = {phase: "resharding_to_infer" for phase in ("encode", "infer", "reshard", "send")} | {
    phase: "resharding_to_train" for phase in ("reference", "score", "train", "save")
}
"""Timing stage that on- and offloading is charged to, by phase; moving the reference has stages of its own."""


class PhaseError(RunError):
    """A part was used while it was off the device."""


class Offloadable(Protocol):
    """A part that holds device memory."""

    def pause(self) -> None:
        """Free the part's device memory."""
        ...

    def resume(self) -> None: ...

    def device_bytes(self) -> int: ...


class OffloadedTensors:
    """Tensors that can be offloaded to host memory and back."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], keep: bool = True) -> None:
        """`tensors` lists the current tensors: an optimizer has none before its first step. Without `keep` they come back as
        zeros."""
        self._tensors, self._keep = tensors, keep
        self._away: list[tuple[torch.UntypedStorage, int, torch.Tensor | None]] = []

    def pause(self) -> None:
        """All of them or, if the host lacks the memory, none."""
        try:
            for tensor in self._held():
                self._free(tensor)
        except BaseException:
            self.resume()
            raise

    def _free(self, tensor: Tensor) -> None:
        storage, copy = tensor.untyped_storage(), None
        if self._keep:
            copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type != "cpu").copy_(tensor)
        self._away.append((storage, storage.nbytes(), copy))
        storage.resize_(0)

    def resume(self) -> None:
        for storage, size, copy in self._away:
            storage.resize_(size)
            bytes_of(storage).copy_(copy) if copy is not None else bytes_of(storage).zero_()
        self._away = []

    def device_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._held())

    def _held(self) -> list[Tensor]:
        """Byte tensor of each storage, once: tied weights share one."""
        tensors = [part(tensor) for tensor in self._tensors()]
        for tensor in tensors:
            if not tensor.untyped_storage().resizable():  # a memory-mapped file
                tensor.data = tensor.data.clone()
        storages = [tensor.untyped_storage() for tensor in tensors]
        return list({storage.data_ptr(): bytes_of(storage) for storage in storages if storage.nbytes()}.values())


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class MemoryManager:
    """Moves the parts of one process between its device and host memory."""

    def __init__(self, clock: Clock, offloaded: Collection[str]) -> None:
        """`offloaded`: the parts to offload while no phase needs them."""
        self._clock, self._offloaded = clock, frozenset(offloaded)
        self._parts: dict[str, Offloadable] = {}
        self._away: set[str] = set()
        self._most: dict[str, int] = {}

    def register(self, name: str, part: Offloadable | None) -> None:
        """Add a part, which is on the device; None removes it."""
        self._parts.pop(name, None)
        self._away.discard(name)
        if part is not None:
            self._parts[name] = part

    @contextmanager
    def phase(self, name: str, stage: str | None = None) -> Iterator[None]:
        """Offload and onload parts for the phase; `stage` times the body, without the moves."""
        needs, move = PHASES[name], MOVES[name]
        leaving = set() if name in CONCURRENT else self._parts.keys() & self._offloaded - needs - self._away
        for one in sorted(leaving):
            with self._clock.span("ref_offload" if one == "reference" else move):
                self._parts[one].pause()
            self._away.add(one)
        coming = needs & self._away
        for one in sorted(coming):
            with self._clock.span("ref_onload" if one == "reference" else move):
                self._parts[one].resume()
            self._away.discard(one)
        if leaving or coming:
            with self._clock.span(move):
                jemalloc.purge()  # after both moves: onloaded tensors may reuse the freed pages
        with self._clock.span(stage) if stage else nullcontext():
            yield
        self.note(name)

    def note(self, phase: str, extra: int = 0) -> None:
        """Record the device bytes of a phase; `extra` are held besides the parts."""
        held = extra + sum(part.device_bytes() for part in self._parts.values())
        self._most[phase] = max(self._most.get(phase, 0), held)

    def held(self) -> dict[str, int]:
        """Bytes of each part that is on the device."""
        return {name: part.device_bytes() for name, part in self._parts.items() if name not in self._away}

    def memory(self) -> Metrics:
        """`memory/<phase>`: peak device memory of the parts in that phase since the last call, GiB."""
        most, self._most = self._most, {}
        return {f"memory/{phase}": held / 2**30 for phase, held in most.items()}


def awake(asleep: bool, what: str) -> None:
    """Raise PhaseError if an engine is called while off the device."""
    if asleep:
        raise PhaseError(f"{what} was asked of an engine that is paused; resume it first")


def holding(version: int | None) -> int:
    """Version of an engine's weights; PhaseError when samples are requested after a pause that discarded them or a failed
    update."""
    if version is None:
        raise PhaseError(
            "sampling was asked of an engine that gave up its weights when it was paused, or whose last update failed;"
            " send it weights first"
        )
    return version


def peak_rss() -> int:
    """Peak resident bytes of this process. getrusage's, which Linux carries over from the program that started this one, are
    for systems that have nothing better."""
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * (int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def memory(device: torch.device | None = None) -> Metrics:
    """`memory/peak_rss_gib`: peak resident memory of this process. `memory/peak_device_gib`: peak memory torch allocated on a
    device with memory of its own. `memory/host_*`: current jemalloc statistics, where it is malloc. All GiB."""
    metrics = {"memory/peak_rss_gib": peak_rss() / 2**30}
    if device is not None and device.type != "cpu":
        metrics["memory/peak_device_gib"] = torch.get_device_module(device).max_memory_allocated(device) / 2**30
    allocator = jemalloc.of_malloc()
    stats = allocator.stats() if allocator else None
    held = {f"memory/host_{name}": size / 2**30 for name, size in asdict(stats).items()} if stats else {}
    return metrics | held
