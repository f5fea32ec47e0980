"""The module `torch.npu`: the device-module interface that torch and rlcore use."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import torch

_initialized = True  # torch's checkpointing replays the random state of initialized devices only
_MULTIPLIER = 0x9E3779B97F4A7C15
_DRAWS = 4  # offset increment per random operator

labelled = 0  # bytes ever allocated as npu tensors
_generator = [0, 0]  # seed and offset, as in the device's own generator


def is_available() -> bool:
    return device_count() > 0


def is_initialized() -> bool:
    return True


def init() -> None: ...


_lazy_init = init


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    """Number of visible devices; a process computes on one of them."""
    shown = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if shown is None:
        return int(os.environ.get("SIMULATED_NPUS", "1"))
    return sum(bool(one.strip()) for one in shown.split(","))


def current_device() -> int:
    return 0


def set_device(device: Any) -> None:
    index(device)


def index(device: Any = None) -> int:
    """0, after validating the argument."""
    number = device if isinstance(device, int) else torch.device(device or "npu").index or 0
    if number or not device_count():
        raise RuntimeError(f"npu:{number} is asked of a process that computes on one of {device_count()} simulated devices")
    return number


class device(contextlib.AbstractContextManager[None]):
    def __init__(self, which: Any) -> None:
        index(which)

    def __exit__(self, *_: object) -> None: ...


def synchronize(device: Any = None) -> None:
    """No-op: every operator is synchronous."""


def get_device_name(device: Any = None) -> str:
    return "simulated"


def empty_cache() -> None: ...


def memory_allocated(device: Any = None) -> int:
    """Not simulated: total bytes ever allocated."""
    return labelled


max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated


def manual_seed(seed: int) -> None:
    _generator[:] = [int(seed) % 2**64, 0]


manual_seed_all = manual_seed


def initial_seed() -> int:
    return _generator[0]


def get_rng_state(device: Any = "npu") -> torch.Tensor:
    """[16] uint8."""
    return torch.tensor(_generator, dtype=torch.uint64).view(torch.uint8).clone()


def set_rng_state(state: torch.Tensor, device: Any = "npu") -> None:
    if state.dtype != torch.uint8 or len(state) != 16:
        raise RuntimeError(f"the state of an npu generator is 16 bytes, not {len(state)} of {state.dtype}")
    _generator[:] = state.clone().view(torch.uint64).tolist()


def next_draw() -> torch.Generator:
    """A CPU generator for one random operator."""
    seed, offset = _generator
    _generator[1] += _DRAWS
    return torch.Generator().manual_seed((seed * _MULTIPLIER + offset) % 2**63)


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


class Stream:
    """Work runs synchronously in call order."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = torch.device("npu", index(device))

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return (end.time - self.time) * 1e3


def current_stream(device: Any = None) -> Stream:
    return Stream(device)


default_stream = current_stream


def stream(stream: Stream | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext()


def set_stream(stream: Stream) -> None: ...
