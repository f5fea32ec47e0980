"""The CPU: a full backend, with vLLM and collectives, and the reference for other devices' numerics."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import psutil
from pydantic import PositiveFloat, PositiveInt

from rlcore.config.sections import Strict
from rlcore.device import Backend, EngineMemory

from ..common import engine_memory, node_address, rendezvous
from ..common.environment import COMMON, NEEDED, wrong
from ..common.torchvision_cure import cure_torchvision

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import ProcessGroup

    from rlcore.distributed.fsdp import Exchange

_GIB = 2**30
_BF16 = "RLCORE_CPU_BF16"


class CpuOptions(Strict):
    threads: PositiveInt | None = None
    """Threads of a matrix product; unset is every core this process may use."""
    kv_cache_gib: PositiveFloat = 1.0
    """Memory of the engine's key-value cache."""


class CpuBackend(Backend):
    """The CPU."""

    name: ClassVar[str] = "cpu"
    Options = CpuOptions
    options: CpuOptions
    default_engine: ClassVar[str] = "vllm"
    environment_requirements: ClassVar[str] = "requirements/cpu.txt"
    engine_memory_option: ClassVar[str | None] = "kv_cache_gib"
    own_memory: ClassVar[bool] = False

    @property
    def threads(self) -> int:
        return self.options.threads or len(os.sched_getaffinity(0))

    def environment(self) -> Mapping[str, str]:
        """Variables to set before torch is imported. Speeds are of a 135M-parameter model on two cores."""
        return {
            **COMMON,
            "OMP_NUM_THREADS": str(self.threads),
            # vLLM's own binding leaves cores idle and decodes four times slower (88 against 387 tokens/s)
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # vLLM ranks logprobs with a torch.compile'd function: a C++ compiler and some 20 s on a fresh machine, for nothing
            "TORCHDYNAMO_DISABLE": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # vLLM's kernels log their memory policy as a warning
        }

    def conflicts(self, given: Mapping[str, str]) -> Iterator[str]:
        yield from wrong(NEEDED, given)
        if given.get(_BF16) not in (None, "0", "1"):
            yield f"{_BF16}={given[_BF16]}: is 1 (this processor has bf16 instructions) or 0 (it has none)"

    def engine_options(self, engine: str) -> Mapping[str, Any]:
        """Engine arguments that depend on the device."""
        return {"kv_cache_memory_bytes": int(self.options.kv_cache_gib * _GIB)} if engine == "vllm" else {}

    def engine_memory(self, engine: str, options: Mapping[str, Any]) -> EngineMemory | None:
        return engine_memory.of(self, engine, options)

    def free_memory(self) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def device(self, local_rank: int) -> torch.device:
        import torch

        return torch.device("cpu")

    def collectives(self) -> str:
        return "gloo"

    def group(self, address: str, rank: int, size: int) -> Any:
        from torch import distributed

        return distributed.ProcessGroupGloo(rendezvous.store(address, rank, size), rank, size, rendezvous.PATIENCE)

    def exchange(self, group: ProcessGroup, bucket_bytes: int) -> Exchange | None:
        """Shared-memory all-gather among ranks of one machine; gloo's sockets are several times slower."""
        from .shared_memory import SharedExchange, one_machine

        return SharedExchange(group, bucket_bytes) if one_machine(group) else None

    def device_resources(self) -> Mapping[str, float]:
        return {"CPU": float(self.threads)}

    def sharing(self, devices: int) -> CpuBackend:
        """Backend with this machine's cores split over its devices, unless the run file sets `threads`."""
        threads = self.options.threads or max(1, self.threads // devices)
        return CpuBackend(self.options.model_copy(update={"threads": threads}))

    def network(self, address: str) -> Mapping[str, str]:
        interface = node_address.interface(address)
        return {"GLOO_SOCKET_IFNAME": interface} if interface else {}

    def default_precision(self) -> str:
        """bf16 only with bf16 instructions: without them oneDNN emulates, 1.4 GFLOP/s against 100-140 in fp32 on two cores.
        RLCORE_CPU_BF16, 1 or 0, overrides the detection, to reproduce a run of another machine."""
        import torch

        if (said := os.environ.get(_BF16)) is not None:
            return "bf16" if said == "1" else "fp32"
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if fast and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"

    @property
    def tile_bytes(self) -> int:
        """Tile size that stays in a core's cache between passes."""
        return 4 * 2**20

    def fuse(self, model: nn.Module) -> nn.Module:
        """Norms and rotary positions of Llama, Qwen2 and Qwen3, and of their vision-language models."""
        from ..common import fused
        from . import operators

        return fused.fuse(model, operators.KERNELS)

    def prepare_host(self) -> None:
        cure_torchvision()

    def prepare(self) -> None:
        import torch

        torch.set_num_threads(self.threads)
        self.prepare_host()
        for name in ("vllm.triton_utils.importing", "torch._library.triton"):  # a missing Triton is expected on a CPU
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message=r".*torch\.distributed\.reduce_op.*", category=FutureWarning)  # vLLM's import
