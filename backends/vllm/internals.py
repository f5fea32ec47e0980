"""Where rlcore reaches into vLLM's own objects."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rlcore.distributed.fingerprint import holds_weights

if TYPE_CHECKING:
    from vllm import LLM


def _runner(llm: LLM) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def _derives(holder: Any) -> bool:
    """Whether tensors that this layer or object holds may change with an update: vLLM has layers rearrange their weights after
    loading, and what serves additions is written by an update of those."""
    if "lora" in type(holder).__module__.split("."):
        return True
    rearranges = isinstance(holder, nn.Module) and hasattr(holder, "process_weights_after_loading")
    return holds_weights(holder) or (rearranges and next(holder.parameters(), None) is not None)


def _cache_of(runner: Any) -> Iterator[Tensor]:
    """Tensors of the key-value cache."""
    for cache in runner.kv_caches:
        yield from cache if isinstance(cache, list | tuple) else [cache]


@contextlib.contextmanager
def _undisturbed_random_state() -> Iterator[None]:
    """vLLM seeds every generator of the process; the trainer's draws must not depend on that."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
