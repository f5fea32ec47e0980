"""Replace layers of transformers' models with a device's fused kernels: norms, gated units, rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from transformers.activations import SiLUActivation

Forward = Callable[..., Any]  # a layer's forward method, `self` first

_ROTATE = "apply_rotary_pos_emb"
_FAMILIES = ("Llama", "Qwen2", "Qwen3", "Qwen2_5_VL")


@dataclass(frozen=True)
class Kernels:
    """Fused kernels of a device. None leaves a layer as it is."""

    name: str  # prefix of the names of replaced layers: NpuLlamaMLP
    norm: Forward | None = None  # x / rms(x) x weight (arXiv 1910.07467)
    unit: Forward | None = None  # SwiGLU (arXiv 2002.05202) between linear layers, which may be wrapped
    rotated: Callable[..., tuple[Tensor, Tensor]] | None = None  # replaces transformers' apply_rotary_pos_emb


def fuse(model: nn.Module, kernels: Kernels) -> nn.Module:
    """Turn layers of known classes into a subclass, in place: only their forward pass differs."""
    for module in model.modules():
        kind = type(module)
        known = kind.__module__.startswith("transformers.models.") and kind.__name__.startswith(_FAMILIES)
        if known and (forward := _forward(module, kernels)):
            module.__class__ = _with(forward, kind, kernels.name)
    return model


def _forward(module: Any, kernels: Kernels) -> Forward | None:
    name = type(module).__name__
    if name.endswith("RMSNorm"):
        return kernels.norm
    if name.endswith("MLP"):
        return kernels.unit if isinstance(module.act_fn, nn.SiLU | SiLUActivation) else None
    if name.endswith("Attention") and kernels.rotated and _ROTATE in type(module).forward.__code__.co_names:
        return _with_rotation(type(module).forward, kernels.rotated)  # others split the three axes first
    return None


@lru_cache
def _with_rotation(forward: FunctionType, rotated: Callable[..., Any]) -> Forward:
    """Copy of the function in which one global name is the kernel. Its module stays unchanged for everyone else."""
    names = {**forward.__globals__, _ROTATE: rotated}
    return FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)


@lru_cache
def _with(forward: Forward, kind: type[nn.Module], prefix: str) -> type[nn.Module]:
    return type(f"{prefix}{kind.__name__}", (kind,), {"forward": forward})
