"""Named tensors that are read one at a time, and views of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlcore.tensor_files import Spec


@dataclass(frozen=True)
class Weights:
    """Tensors by name. `specs` are in the order in which reading is cheapest: neighbours come from one place in a file."""

    specs: Mapping[str, Spec]
    read: Callable[[str], Tensor]  # contiguous, on the host, the caller's own

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


def spec_of(tensor: Tensor) -> Spec:
    return Spec(tuple(tensor.shape), tensor.dtype)


def selected(weights: Weights, names: Mapping[str, str]) -> Weights:
    """Rename and select: `names` maps new names to those in `weights`."""
    return Weights({new: weights.specs[old] for new, old in names.items()}, lambda name: weights.read(names[name]))


def joined(*parts: Weights) -> Weights:
    """The tensors of all; names must be different."""
    owners = {name: weights for weights in parts for name in weights.specs}
    specs = {name: spec for weights in parts for name, spec in weights.specs.items()}
    return Weights(specs, lambda name: owners[name].read(name))


def derived(weights: Weights, make: Callable[[str, Tensor], Mapping[str, Tensor]]) -> tuple[Weights, dict[str, list[str]]]:
    """Tensors that `make(name, tensor)` makes of each tensor, and which tensors each name comes from.

    `make` must work on meta tensors too. The parts of the tensor read last are kept, so a fused one is read once for all.
    """
    specs, origins = dict[str, Spec](), dict[str, list[str]]()
    for origin, spec in weights.specs.items():
        for name, part in make(origin, spec.meta()).items():
            specs.setdefault(name, spec_of(part))
            origins.setdefault(name, []).append(origin)
    last: dict[str, Mapping[str, Tensor]] = {}

    def read(name: str) -> Tensor:
        origin = origins[name][0]
        if origin not in last:
            last.clear()
            last[origin] = make(origin, weights.read(origin))
        part = last[origin][name]
        if len(last[origin]) == 1:
            last.clear()
        return part.contiguous()

    return Weights(specs, read), origins


def as_dtype(weights: Weights, dtype: torch.dtype | None) -> Weights:
    """Floating-point tensors converted to `dtype`; None keeps them."""
    if dtype is None:
        return weights
    specs = {
        name: replace(spec, dtype=dtype) if spec.dtype.is_floating_point else spec for name, spec in weights.specs.items()
    }
    return Weights(specs, lambda name: weights.read(name).to(specs[name].dtype))


def few(names: Iterable[str], shown: int = 6) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:shown]) + (f" and {len(listed) - shown} more" if len(listed) > shown else "")
