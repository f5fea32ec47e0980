"""NVIDIA GPUs: NCCL, flash attention over packed rows, vLLM with CUDA graphs and sleep mode."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rlcore.config.sections import Strict
from rlcore.device import Backend, EngineMemory
from rlcore.errors import ConfigError

from ..common import engine_memory, node_address, rendezvous
from ..common.environment import COMMON, NEEDED, sleepless, wrong
from ..common.torchvision_cure import cure_torchvision

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rlcore.model.attention import Ragged


_ALLOCATOR = "PYTORCH_ALLOC_CONF"
# by the driver, by NCCL and cuBLAS for their own buffers, and by vLLM about its warm-up
_OUT_OF_MEMORY = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)


class CudaOptions(Strict):
    engine_memory: float = Field(0.5, gt=0, lt=1)
    """Fraction of device memory for the engine's weights and key-value cache together (gpu_memory_utilization)."""
    sleep_level: Literal[0, 1, 2] = 2
    """vLLM sleep level of an engine that placement.offload offloads. 0: frees the key-value cache, keeps the weights; 1: moves
    the weights to host memory; 2: discards them, since the next sync sends them all."""
    optimizer: Literal["torch", "apex"] = "torch"
    """AdamW implementation. apex: NVIDIA's FusedAdam, which must be built from source and takes unsharded weights only."""


class CudaBackend(Backend):
    """NVIDIA GPUs."""

    name: ClassVar[str] = "cuda"
    Options = CudaOptions
    options: CudaOptions
    default_engine: ClassVar[str] = "vllm"
    environment_requirements: ClassVar[str] = "requirements/cuda.txt"
    spellings: ClassVar[Mapping[str, str]] = {"PYTORCH_CUDA_ALLOC_CONF": _ALLOCATOR}
    engine_memory_option: ClassVar[str | None] = "engine_memory"

    def environment(self) -> Mapping[str, str]:
        """Expandable segments, since packed rows differ in length and fragment fixed ones. vLLM turns them off around the
        memory of its sleep mode."""
        return {**COMMON, _ALLOCATOR: "expandable_segments:True"}

    def conflicts(self, given: Mapping[str, str]) -> Iterator[str]:
        yield from wrong(NEEDED, given)
        if self.options.sleep_level:  # whose memory pools only torch's native allocator has
            name = _ALLOCATOR if _ALLOCATOR in given else "PYTORCH_CUDA_ALLOC_CONF"
            yield from sleepless(name, "backend:cudaMallocAsync", given)

    def engine_options(self, engine: str) -> Mapping[str, Any]:
        if engine != "vllm":
            return {}
        return {
            "gpu_memory_utilization": self.options.engine_memory,
            "enable_sleep_mode": self.options.sleep_level > 0,
            "enforce_eager": False,  # decoding is many small kernels: CUDA graphs launch them together
        }

    def engine_memory(self, engine: str, options: Mapping[str, Any]) -> EngineMemory | None:
        return engine_memory.of(self, engine, options)

    def shortage(self, error: BaseException) -> Literal["device", "host"] | None:
        of_libraries = isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))
        return super().shortage(error) or ("device" if of_libraries else None)

    def adamw(self, groups: Sequence[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
        if self.options.optimizer == "torch":
            return super().adamw(groups, **settings)
        from . import apex_adamw

        return apex_adamw.build(groups, **settings)

    def device(self, local_rank: int) -> torch.device:
        import torch

        return torch.device("cuda", local_rank)

    def collectives(self) -> str:
        return "cpu:gloo,cuda:nccl"

    def group(self, address: str, rank: int, size: int) -> Any:
        from torch import distributed

        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = rendezvous.PATIENCE
        return distributed.ProcessGroupNCCL(rendezvous.store(address, rank, size), rank, size, options)

    def device_resources(self) -> Mapping[str, float]:
        return {"GPU": 1.0, "CPU": 1.0}

    def network(self, address: str) -> Mapping[str, str]:
        interface = node_address.interface(address)
        return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}

    def default_precision(self) -> str:
        """bf16 from Ampere (compute capability 8.0) on, and where no GPU is seen: in a plan for one elsewhere."""
        import torch

        return "bf16" if not torch.cuda.is_available() or torch.cuda.get_device_capability(0) >= (8, 0) else "fp32"

    def prepare_host(self) -> None:
        cure_torchvision()

    def prepare(self) -> None:
        """ConfigError when torch finds no GPU."""
        import torch

        if not torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            limited = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
            built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
            raise ConfigError(
                f"backend.name: cuda, but torch {torch.__version__}, which {built}, finds no GPU{limited}; see nvidia-smi, or"
                f" install {self.environment_requirements}"
            )
        from rlcore.model import attention

        attention.use(flash, (torch.float16, torch.bfloat16))


def flash(query: Tensor, key: Tensor, value: Tensor, spans: Ragged, scale: float) -> Tensor:
    """Packed-attention `Kernel`: FlashAttention-2 for sequences of different lengths (arXiv 2307.08691), its causal mask
    aligned to each sequence's last key."""
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query, key, value, spans.query_starts, spans.key_starts, max(spans.query_lengths), max(spans.key_lengths),
        scale=scale, window_size=(-1, 0), enable_gqa=True,
    )
    assert not isinstance(output, tuple), "a pair only where return_aux asks for one"
    return output
