"""Qwen3-MoE: a router sends each token to a few of a layer's experts. transformers keeps a layer's experts in two tensors, the
published files have three of each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from rlcore.model.routing import replace_routers

from .causal_lm import CausalLM

EXPERTS = ".mlp.experts."


class Qwen3Moe(CausalLM):
    """Qwen3-MoE, also with dense layers in between."""

    def published(self, name: str, shape: Sequence[int]) -> Mapping[str, Sequence[int]]:
        """gate_up_proj is [E, 2I, D]: of each expert its gate_proj [I, D], then its up_proj; down_proj is [E, D, I]."""
        layer, experts, leaf = name.partition(EXPERTS)
        if not experts:
            return super().published(name, shape)
        count, rows, columns = shape
        projections = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        part = (rows // len(projections), columns)
        return {
            f"{layer}{EXPERTS}{number}.{projection}.weight": part for number in range(count) for projection in projections
        }

    def widen(self, model: nn.Module) -> nn.Module:
        """Also the routers."""
        return replace_routers(super().widen(model))
