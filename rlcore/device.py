"""What the core asks of a device. A plugin derives from `Backend` and registers as an entry point of `rlcore.backends`.

Imports nothing heavy: a backend says what must stand in the environment before torch is imported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

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


class Backend(ABC):
    """A device: facts, and what only this device has."""

    name: ClassVar[str]
    Options: ClassVar[type[BaseModel]] = NoOptions
    default_engine: ClassVar[str] = "torch"
    environment_requirements: ClassVar[str] = "the backend's own requirements"  # the file that installs its stack
    spellings: ClassVar[Mapping[str, str]] = {}  # older names of variables in `environment`, read where those are unset

    def __init__(self, options: Any = None) -> None:
        self.options = options or self.Options()
        self.given: Mapping[str, str] = {}  # of `environment`, what the user has set, once it has been applied

    @abstractmethod
    def device(self, local_rank: int) -> torch.device: ...

    @abstractmethod
    def collectives(self) -> str:
        """What processes of this device talk through, as torch.distributed names it."""

    @abstractmethod
    def group(self, address: str, rank: int, size: int) -> Any:
        """Processes that meet at `address` (host:port), beside the ranks of their pools: a group that broadcasts."""

    def environment(self) -> Mapping[str, str]:
        """Environment variables that must stand before torch is imported, unless the user has set them."""
        return {}

    def conflicts(self, given: Mapping[str, str]) -> Iterable[str]:
        """What the user has set to something that this device cannot work with, each with what it needs and why."""
        return ()

    def apply_environment(self, environment: MutableMapping[str, str]) -> None:
        """Completes the environment of this process; `given` is for those that it starts elsewhere. ConfigError lists every
        conflict at once."""
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
        """Once a process, after torch can be imported: what this device needs before models load."""

    def default_precision(self) -> str:
        """"bf16" where the device multiplies bf16 matrices in hardware, else "fp32"."""
        return "fp32"

    @property
    def tile_bytes(self) -> int:
        """Of float32 logits at a time, in the log-probability head. Large ones are few launches."""
        return 256 * 2**20

    def fuse(self, model: nn.Module) -> nn.Module:
        """The model, this device's kernels in the place of its layers' own. Names, weights and, to rounding, numbers stay."""
        return model

    def adamw(self, groups: Sequence[Mapping[str, Any]], **settings: Any) -> torch.optim.Optimizer:
        """AdamW (arXiv 1711.05101) over torch's parameter groups. Its state is torch's: step, exp_avg and exp_avg_sq."""
        from torch.optim import AdamW

        return AdamW(groups, fused=True, **settings)

    def engine_options(self, engine: str) -> Mapping[str, Any]:
        """Arguments of an engine that are this device's affair; what the run file says comes on top."""
        return {}

    def exchange(self, group: ProcessGroup, bucket_bytes: int) -> Exchange | None:
        """What is quicker than a collective to gather weights in buckets, if there is something."""
        return None

    def device_resources(self) -> Mapping[str, float]:
        """What a scheduler of many machines calls one device, and how much of it that is."""
        return {"CPU": 1.0}

    def sharing(self, devices: int) -> Backend:
        """As one of so many devices on a machine: what they have in common is split."""
        return self

    def network(self, address: str) -> Mapping[str, str]:
        """Environment variables by which collectives find the others through the interface that has this address."""
        return {}
