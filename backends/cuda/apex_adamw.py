"""AdamW by NVIDIA apex's FusedAdam: one kernel for all tensors. It counts steps per parameter group, torch per parameter; the
state saved here has torch's form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rlcore.diagnose import host
from rlcore.errors import ConfigError, PluginError

_WHERE = "backend.options.optimizer: apex"
_REMEDY = "build NVIDIA's from source (github.com/NVIDIA/apex, with its C++ and CUDA extensions), or set optimizer: torch"


def build(groups: Sequence[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """Build the optimizer. PluginError without NVIDIA's apex; ConfigError for weights sharded over several devices."""
    kind = _counting(_fused_adam())
    if any(isinstance(parameter, DTensor) for group in groups for _, parameter in group["params"]):
        raise ConfigError(
            f"{_WHERE}: its kernels take whole tensors, and these weights are dealt over several devices; set optimizer: torch"
        )
    return kind(groups, adam_w_mode=True, **settings)


def _fused_adam() -> type[torch.optim.Optimizer]:
    """NVIDIA's FusedAdam. PyPI's package `apex` is something else."""
    found = host.apex()
    if found.verdict != "ok":
        seen = "it is not installed" if found.verdict == "absent" else found.seen
        raise PluginError(f"{_WHERE}: {seen}; {_REMEDY}")
    try:
        import amp_C  # noqa: F401  # pyright: ignore[reportMissingImports]
        from apex.multi_tensor_apply import multi_tensor_applier  # pyright: ignore[reportMissingImports]
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PluginError(f"{_WHERE}: {found.seen}, but does not import: {error}; {_REMEDY}") from error
    if not multi_tensor_applier.available:
        raise PluginError(f"{_WHERE}: {found.seen}, but without its kernels (multi_tensor_applier.available); {_REMEDY}")
    return FusedAdam


@cache
def _counting(fused_adam: type[Any]) -> Callable[..., torch.optim.Optimizer]:
    class ApexAdamW(fused_adam):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """One kernel call per set of a group's parameters with equal step counts: nearly always one per group."""
            groups = self.param_groups
            self.param_groups = parts = [part for group in groups for part in self._parts(group)]
            try:
                result = super().step(closure)
            finally:
                self.param_groups = groups
            for part in parts:
                for parameter in part["params"]:
                    self.state[parameter]["step"] = torch.tensor(float(part["step"]))
            return result

        def _parts(self, group: Mapping[str, Any]) -> list[dict[str, Any]]:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[int(self.state[parameter].get("step", 0))].append(parameter)
            return [{**group, "params": parameters, "step": steps} for steps, parameters in alike.items()]

    return ApexAdamW
