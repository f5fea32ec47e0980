"""The device interface. A plugin derives from `Backend` and registers as an entry point of `rlcore.backends`.

Imports nothing heavy: a backend sets environment variables before torch is imported.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel

from rlcore.config.sections import Strict
from rlcore.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import ProcessGroup

    from rlcore.distributed.fsdp import Exchange


class NoOptions(Strict):
    """`backend.options` of a device that has none."""


@dataclass(frozen=True)
class EngineMemory:
    """What an engine takes beside its weights, and which setting says so."""

    key: str
    now: float  # the setting's value
    cache: int | None = None  # bytes of the key-value cache; None: what `now`, a share of the device, leaves beside the weights
    sleeps: int = 0  # a pause keeps the weights on the device (0), moves them to the host (1) or drops them (2)
    process: int = 0  # bytes of host memory for the engine's own code and state


class Backend(ABC):
    """A kind of device: its properties, and what only it provides."""

    name: ClassVar[str]
    Options: ClassVar[type[BaseModel]] = NoOptions
    default_engine: ClassVar[str] = "torch"
    environment_requirements: ClassVar[str] = "the backend's own requirements"  # the file that installs its stack
    spellings: ClassVar[Mapping[str, str]] = {}  # older names of variables in `environment`, read where those are unset
    engine_memory_option: ClassVar[str | None] = None  # the option of `Options` that sets the engine's memory
    own_memory: ClassVar[bool] = True  # whether a device has memory of its own, beside the host's

    options: Any  # of the class `Options`; a backend that has some declares which: `options: MyOptions`

    def __init__(self, options: Any = None) -> None:
        self.options = options or self.Options()
        self.given: Mapping[str, str] = {}  # variables of `environment` that the user has set, once applied

    @abstractmethod
    def device(self, local_rank: int) -> torch.device: ...

    @abstractmethod
    def collectives(self) -> str:
        """torch.distributed backend for processes of this device."""

    @abstractmethod
    def group(self, address: str, rank: int, size: int) -> Any:
        """Rendezvous at `address` (host:port), besides the groups of the pools; returns a group that broadcasts."""

    def environment(self) -> Mapping[str, str]:
        """Environment variables to set before torch is imported, unless the user has set them."""
        return {}

    def conflicts(self, given: Mapping[str, str]) -> Iterable[str]:
        """User-set variables that this device cannot work with, each with the value needed and why."""
        return ()

    def apply_environment(self, environment: MutableMapping[str, str]) -> None:
        """Complete the environment of this process; `given` is for processes that it starts elsewhere. ConfigError lists all
        conflicts at once."""
        if wrong := list(self.conflicts(environment)):
            raise ConfigError(
                f"backend.name {self.name}: these environment variables are set to what the run cannot work with; unset them,"
                " or change the option that is named:\n  " + "\n  ".join(wrong)
            )
        defaults = self.environment()
        found = {new: environment[old] for old, new in self.spellings.items() if old in environment} | dict(environment)
        self.given = {name: found[name] for name in defaults if name in found}
        environment.update({**defaults, **self.given})

    def prepare(self) -> None:  # noqa: B027
        """Prepare the device before models load; called once per process, after torch can be imported."""

    def prepare_host(self) -> None:  # noqa: B027
        """Prepare this process to read configurations, tokenizers and images where the device is absent: for plans."""

    def default_precision(self) -> str:
        """"bf16" where the device multiplies bf16 matrices in hardware, else "fp32"."""
        return "fp32"

    @property
    def tile_bytes(self) -> int:
        """Tile size of float32 logits in the log-probability head. Large tiles mean few kernel launches."""
        return 256 * 2**20

    def fuse(self, model: nn.Module) -> nn.Module:
        """Replace layers' kernels by this device's. Names, weights and, up to rounding, results stay the same."""
        return model

    def adamw(self, groups: Sequence[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
        """AdamW (arXiv 1711.05101) over torch's parameter groups. Its state is torch's: step, exp_avg and exp_avg_sq."""
        from torch.optim import AdamW

        return AdamW(groups, fused=True, **settings)

    def engine_options(self, engine: str) -> Mapping[str, Any]:
        """Device-specific arguments of an engine; the run file overrides them."""
        return {}

    def engine_memory(self, engine: str, options: Mapping[str, Any]) -> EngineMemory | None:
        """Memory of an engine with these arguments (rollout.options); None for one whose cache grows with what it samples."""
        return None

    def shortage(self, error: BaseException) -> Literal["device", "host"] | None:
        """Which memory ran out, if that is what the error says."""
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            return "device"
        text = str(error)
        allocators = isinstance(error, RuntimeError) and ("can't allocate memory" in text or "std::bad_alloc" in text)
        system = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        return "host" if allocators or system else None

    def free_memory(self) -> tuple[int, int] | None:
        """Bytes of the device's memory: free, and in all; None where torch cannot say."""
        import torch

        device = self.device(0)
        ask = getattr(torch.get_device_module(device), "mem_get_info", None)
        return ask(device) if ask else None

    def exchange(self, group: ProcessGroup, bucket_bytes: int) -> Exchange | None:
        """A faster all-gather than the collective one for weight sync, or None."""
        return None

    def device_resources(self) -> Mapping[str, float]:
        """Scheduler resources of one device, e.g. {"GPU": 1}."""
        return {"CPU": 1.0}

    def sharing(self, devices: int) -> Backend:
        """This backend as one of `devices` on a machine, with shared resources split among them."""
        return self

    def network(self, address: str) -> Mapping[str, str]:
        """Environment variables that make collectives use the network interface with this address."""
        return {}
