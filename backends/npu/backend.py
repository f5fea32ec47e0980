"""Ascend NPUs: settings for torch_npu, HCCL, vllm-ascend and Ray.

Names and defaults follow torch_npu, vllm-ascend 0.23 and the runtime environment of MindSpeed-RL.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from rlcore.config.sections import Strict
from rlcore.device import Backend, EngineMemory
from rlcore.errors import ConfigError, PluginError

from ..common import engine_memory, environment, node_address, rendezvous
from ..common.environment import COMMON
from ..common.torchvision_cure import cure_torchvision

if TYPE_CHECKING:
    import torch
    from torch import nn

ALLOCATOR = "PYTORCH_NPU_ALLOC_CONF"
_CORES = 8  # default limit per device process

DEFAULTS: Mapping[str, str] = {
    **COMMON,
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # `prepare` imports torch_npu and says what is missing; `import torch` would just die
    "HCCL_CONNECT_TIMEOUT": "1800",  # seconds to wait for peers to connect; they may still be loading a model
    "HCCL_EXEC_TIMEOUT": "3600",  # seconds, timeout of one collective
    "HCCL_BUFFSIZE": "256",  # MiB of HCCL's buffers, per group
    # several processes on one device (a trainer and another's engine) need separate ports
    "HCCL_HOST_SOCKET_PORT_RANGE": "auto",
    "HCCL_NPU_SOCKET_PORT_RANGE": "auto",
    "TASK_QUEUE_ENABLE": "2",  # launch operators from a separate thread: more overlap, a higher memory peak
    "CPU_AFFINITY_CONF": "1",  # pin threads to the cores next to their device
}

NEEDED: Mapping[str, tuple[str, str]] = {
    **environment.NEEDED,
    "VLLM_ASCEND_ENABLE_NZ": ("0", "weights that are kept in the NZ layout cannot be updated in place"),
    "VLLM_WORKER_MULTIPROC_METHOD": ("spawn", "a forked process cannot use the device"),
    "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": ("0", "each worker must see its own device only"),
    "TORCH_TRANSFER_TO_NPU": ("0", "it turns torch.cuda into torch.npu and so hides code that is for another device"),
}
"""Required values, and why."""

DETERMINISTIC: Mapping[str, tuple[str, str]] = {
    name: (value, "backend.options.deterministic")
    for name, value in {
        "HCCL_DETERMINISTIC": "true", "LCCL_DETERMINISTIC": "1", "CLOSE_MATMUL_K_SHIFT": "1",
        "ATB_MATMUL_SHUFFLE_K_ENABLE": "0", "ATB_LLM_LCOC_ENABLE": "0", "PYTHONHASHSEED": "0",
    }.items()
}  # fmt: skip
"""Deterministic reduction order; torch's own setting is in `prepare`."""


class NpuOptions(Strict):
    fused: bool = True
    """Ascend's fused kernels for attention (fp16 and bf16), norms, gated units and rotary positions; false: plain torch."""
    cores: PositiveInt | None = None
    """CPU cores per device process; unset is 8, or an equal share where the machine has fewer."""
    deterministic: bool = False
    """Bitwise reproducible runs, at some cost in speed."""
    engine_memory: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Fraction of device memory for the engine's weights and key-value cache together."""
    sleep_level: Literal[0, 1, 2] = 0
    """vLLM sleep level of an engine that placement.offload offloads. 0: frees the key-value cache, keeps the weights; 1: moves
    the weights to host memory; 2: discards them, since the next sync sends them all. Above 0 rules out expandable segments."""


class NpuBackend(Backend):
    """Ascend NPUs."""

    name: ClassVar[str] = "npu"
    Options = NpuOptions
    options: NpuOptions
    default_engine: ClassVar[str] = "vllm"
    environment_requirements: ClassVar[str] = "requirements/npu.txt"
    engine_memory_option: ClassVar[str | None] = "engine_memory"

    def environment(self) -> Mapping[str, str]:
        return {**DEFAULTS, **{name: value for name, (value, _) in self._needed().items()}}

    def conflicts(self, given: Mapping[str, str]) -> Iterator[str]:
        yield from environment.wrong(self._needed(), given)
        if self.options.sleep_level:
            yield from environment.sleepless(ALLOCATOR, "expandable_segments:True", given)

    def engine_options(self, engine: str) -> Mapping[str, Any]:
        """Engine arguments that depend on the device."""
        if engine != "vllm":
            return {}
        return {"gpu_memory_utilization": self.options.engine_memory, "enable_sleep_mode": self.options.sleep_level > 0}

    def shortage(self, error: BaseException) -> Literal["device", "host"] | None:
        """torch_npu raises a plain RuntimeError, "NPU out of memory. Tried to allocate ..."."""
        of_allocator = isinstance(error, RuntimeError) and "NPU out of memory" in str(error)
        return super().shortage(error) or ("device" if of_allocator else None)

    def engine_memory(self, engine: str, options: Mapping[str, Any]) -> EngineMemory | None:
        return engine_memory.of(self, engine, options)

    def device(self, local_rank: int) -> torch.device:
        import torch

        return torch.device("npu", local_rank)

    def collectives(self) -> str:
        """gloo beside hccl: control messages between ranks are small, and in host memory."""
        return "cpu:gloo,npu:hccl"

    def group(self, address: str, rank: int, size: int) -> Any:
        import torch_npu  # pyright: ignore[reportMissingImports]

        kind = torch_npu._C._distributed_c10d.ProcessGroupHCCL
        options = kind.Options()
        options._timeout = rendezvous.PATIENCE
        return kind(rendezvous.store(address, rank, size), rank, size, options)

    def device_resources(self) -> Mapping[str, float]:
        """Resources of one device in Ray's names. Ray sets ASCEND_RT_VISIBLE_DEVICES, so each process sees its device as 0."""
        return {"NPU": 1.0, "CPU": float(self.options.cores or min(_CORES, len(os.sched_getaffinity(0))))}

    def sharing(self, devices: int) -> NpuBackend:
        """Backend with this machine's cores split over its devices, up to 8 each, unless the run file sets `cores`."""
        fair = max(1, min(_CORES, len(os.sched_getaffinity(0)) // devices))
        return NpuBackend(self.options.model_copy(update={"cores": self.options.cores or fair}))

    def network(self, address: str) -> Mapping[str, str]:
        interface = node_address.interface(address)
        return dict.fromkeys(("HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), interface) if interface else {}

    def default_precision(self) -> str:
        return "bf16"

    def prepare(self) -> None:
        """Register the NPU with torch. PluginError when torch_npu or a dependency of it is missing."""
        try:
            import torch
            import torch_npu  # noqa: F401  # pyright: ignore[reportMissingImports]
        except (ImportError, OSError, RuntimeError) as error:
            raise PluginError(f"backend.name npu: {_remedy(error)}") from error
        if torch.cuda.is_available() or "torch_npu.contrib.transfer_to_npu" in sys.modules:
            raise ConfigError(
                "backend.name npu: transfer_to_npu is active: torch.cuda is torch.npu now, so that code for another device"
                " runs unnoticed, and torch.jit.script does nothing; remove its import (torch_npu.contrib.transfer_to_npu)"
            )
        cure_torchvision()
        if self.options.deterministic:
            torch.use_deterministic_algorithms(True)
        if self.options.fused:
            from rlcore.model import attention

            from . import operators

            attention.use(operators.attention, operators.DTYPES)

    def prepare_host(self) -> None:
        cure_torchvision()

    def fuse(self, model: nn.Module) -> nn.Module:
        """Fuse norms, gated units and rotary positions of Llama, Qwen2 and Qwen3, and of their vision-language models."""
        if not self.options.fused:
            return model
        from ..common import fused
        from . import operators

        return fused.fuse(model, operators.KERNELS)

    def _needed(self) -> Mapping[str, tuple[str, str]]:
        return {**NEEDED, **(DETERMINISTIC if self.options.deterministic else {})}


def _remedy(error: BaseException) -> str:
    """Message: what is missing, and its remedy."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
        return f"torch_npu is not installed; pip install -r {NpuBackend.environment_requirements}"
    if "cannot open shared object file" in text:
        return (
            f"torch_npu finds no CANN ({text}); run `source /usr/local/Ascend/ascend-toolkit/set_env.sh`, or install the"
            " toolkit and the driver that this torch_npu was built for"
        )
    return f"torch_npu does not import: {text}; its version must be that of torch, on a torch built for processors only"
