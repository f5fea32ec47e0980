"""NVIDIA GPUs: NCCL, flash attention over packed rows, vLLM with CUDA graphs and sleep mode."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from rlcore.backend import Backend
from rlcore.config import Strict
from rlcore.errors import ConfigError

from . import meeting, node_address
from .surroundings import COMMON

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rlcore.attention import Ragged


class CudaOptions(Strict):
    engine_memory: float = Field(0.5, gt=0, lt=1)
    """Part of a device's memory that the engine may use, weights and key-value cache together (gpu_memory_utilization)."""
    sleep_mode: bool = True
    """vLLM's sleep mode, which placement.offload [engine] needs: memory that can leave the device without moving."""


class CudaBackend(Backend):
    """Facts of NVIDIA GPUs."""

    name: ClassVar[str] = "cuda"
    Options: ClassVar[type[CudaOptions]] = CudaOptions
    default_engine: ClassVar[str] = "vllm"
    environment_requirements: ClassVar[str] = "requirements/cuda.txt"

    def environment(self) -> Mapping[str, str]:
        return {
            **COMMON,
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # packed rows differ in length, which fragments fixed segments
        }

    def engine_options(self, engine: str) -> Mapping[str, Any]:
        if engine != "vllm":
            return {}
        return {
            "gpu_memory_utilization": self.options.engine_memory,
            "enable_sleep_mode": self.options.sleep_mode,
            "enforce_eager": False,  # decoding is many small kernels: CUDA graphs start them together
        }

    def device(self, local_rank: int) -> torch.device:
        import torch

        return torch.device("cuda", local_rank)

    def collectives(self) -> str:
        return "cpu:gloo,cuda:nccl"

    def group(self, address: str, rank: int, size: int) -> Any:
        from torch import distributed

        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = meeting.PATIENCE
        return distributed.ProcessGroupNCCL(meeting.store(address, rank, size), rank, size, options)

    def bundle(self) -> Mapping[str, float]:
        return {"GPU": 1.0, "CPU": 1.0}

    def network(self, address: str) -> Mapping[str, str]:
        interface = node_address.interface(address)
        return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}

    def default_precision(self) -> str:
        """bf16 from Ampere (compute capability 8.0) on."""
        import torch

        return "bf16" if torch.cuda.get_device_capability(0) >= (8, 0) else "fp32"

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
        from rlcore import attention

        attention.use(flash, (torch.float16, torch.bfloat16))


def flash(query: Tensor, key: Tensor, value: Tensor, spans: Ragged, scale: float) -> Tensor:
    """`rlcore.attention.Kernel`: FlashAttention-2 for sequences of different lengths (arXiv 2307.08691), whose causal mask ends
    at a sequence's last key."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        query, key, value, spans.query_starts, spans.key_starts, max(spans.query_lengths), max(spans.key_lengths),
        scale=scale, window_size=(-1, 0), enable_gqa=True,
    )
