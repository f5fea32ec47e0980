"""Experts of a mixture in vLLM: where a tensor of one expert goes, and what the engine should hold of it. Read from vLLM 0.32.

vLLM keeps the gate and up projections of all experts of a layer in one tensor, the down projections in another; its CPU kernels
read each expert padded and in a packed order of elements, which cannot be undone. So what is sent is packed too, and compared
with the engine's bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rlcore.distributed.fingerprint import Fingerprint, fingerprint
from rlcore.errors import ConfigError

GATE_UP, DOWN = "w13_weight", "w2_weight"
_HOLDER = "routed_experts"
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_READABLE = ("CPU", "TRITON", "BATCHED_TRITON")  # kernels whose layout is known here


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that hold experts, by name."""
    return ((name, layer) for name, layer in model.named_modules() if name.endswith(f".{_HOLDER}"))


def place(name: str) -> tuple[str, str, int] | None:
    """Layer, parameter and index of a tensor: 2 e of expert e's gate, 2 e + 1 of its up projection, e of its down projection.
    None for a tensor of no expert."""
    if (match := _EXPERT.fullmatch(name)) is None:
        return None
    parent, number, kind = match[1], int(match[2]), match[3]
    holder = f"{parent}.{_HOLDER}"
    return (holder, DOWN, number) if kind == "down" else (holder, GATE_UP, 2 * number + (kind == "up"))


def title(layer: str, parameter: str, index: int) -> str:
    """The name that `place` took apart."""
    number, kind = (index, "down") if parameter == DOWN else (index // 2, ("gate", "up")[index % 2])
    return f"{layer.removesuffix(_HOLDER)}{number}.{kind}_proj.weight"


def check(model: nn.Module) -> None:
    """ConfigError for a layout of experts that cannot be verified."""
    for _, layer in layers(model):
        kernel = layer.quant_method.unquantized_backend.name
        if kernel not in _READABLE:
            raise ConfigError(
                f"rollout.options.moe_backend: vLLM computes this model's experts by {kernel}, in a layout whose update cannot"
                " be verified; set it to triton"
            )
        if layer.moe_config.moe_parallel_config.use_ep:
            raise ConfigError(
                "rollout.options.enable_expert_parallel: each process must hold a part of every expert for its update to be"
                " verified; remove it"
            )


class ExpertLayer:
    """A layer's experts as its kernel reads them. While an update loads, the layer itself has other tensors and no kernel."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._ranks = layer, layer.moe_config.moe_parallel_config
        kernel = layer.quant_method.moe_kernel.fused_experts
        self._isa = None if getattr(kernel, "_use_zentorch", True) else kernel.isa  # of a kernel that reads a packed order
        self._rows, self._columns = getattr(layer, GATE_UP).shape[1] // 2, getattr(layer, DOWN).shape[2]

    def tensors(self, parameter: str) -> int:
        """Number of tensors that are sent of a parameter."""
        return self._layer.global_num_experts * (1 if parameter == DOWN else 2)

    def part(self, parameter: str, tensor: Tensor) -> Tensor:
        """This tensor-parallel rank's rows of a gate or up projection, columns of a down projection."""
        return tensor.chunk(self._ranks.tp_size, dim=1 if parameter == DOWN else 0)[self._ranks.tp_rank]

    def packed(self, *parts: Tensor) -> Tensor:
        """An expert's down projection, or its gate and up projections, as the engine should hold them."""
        if len(parts) == 1:
            whole = pad(parts[0], (0, self._columns - parts[0].shape[1]))
        else:
            whole = torch.cat([pad(part, (0, 0, 0, self._rows - len(part))) for part in parts])
        if self._isa is None:
            return whole
        from vllm._custom_ops import cpu_prepack_moe_weight

        return cpu_prepack_moe_weight(whole[None].contiguous(), self._isa)[0]

    def held(self, parameter: str, number: int) -> Tensor:
        return getattr(self._layer, parameter)[number]


class SentExperts:
    """What was sent of experts, as the engine should hold it. Gate and up projection are one tensor there: a fault of one is
    reported of both."""

    def __init__(self) -> None:
        self.sent: dict[str, Fingerprint] = {}
        self._places: dict[str, tuple[ExpertLayer, str, int]] = {}
        self._halves: dict[tuple[ExpertLayer, int], tuple[str, Tensor]] = {}  # those whose other half is to come

    def add(self, layer: ExpertLayer, parameter: str, index: int, name: str, tensor: Tensor) -> None:
        """`tensor` is this rank's part, in the dtype it is served in."""
        if parameter == DOWN:
            self._note(layer, parameter, index, {name: tensor})
        elif (other := self._halves.pop((layer, index ^ 1), None)) is None:
            self._halves[layer, index] = name, tensor.clone()
        else:
            halves = [other, (name, tensor)] if index % 2 else [(name, tensor), other]
            self._note(layer, parameter, index // 2, dict(halves))

    def held(self) -> dict[str, Fingerprint]:
        """Fingerprints of what the engine holds of them."""
        return {name: fingerprint(layer.held(parameter, number)) for name, (layer, parameter, number) in self._places.items()}

    def _note(self, layer: ExpertLayer, parameter: str, number: int, parts: dict[str, Tensor]) -> None:
        self.sent |= dict.fromkeys(parts, fingerprint(layer.packed(*parts.values())))
        self._places |= dict.fromkeys(parts, (layer, parameter, number))
