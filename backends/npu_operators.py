"""Ascend's own kernels where a model spends its time: attention over packed rows, norms, gated units, rotary positions.

Names and limits are those of torch_npu 2.10.0.post4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from types import FunctionType
from typing import Any

import torch
import torch_npu
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from rlcore.attention import Ragged

Forward = Callable[..., Any]

DTYPES = (torch.float16, torch.bfloat16)  # float32 is for comparing devices: such rows stay with plain torch
_MOST_SPANS = 1024  # in one call
_MASK_SIDE = 2048  # of the one mask for scores of any size
_CAUSAL_TO_THE_LAST_KEY = 3  # sparse_mode
_ROTATE = "apply_rotary_pos_emb"


def attention(query: Tensor, key: Tensor, value: Tensor, spans: Ragged, scale: float) -> Tensor:
    """`rlcore.attention.Kernel`: FlashAttention-2 for sequences of different lengths (arXiv 2307.08691)."""
    firsts = range(0, len(spans.query_lengths), _MOST_SPANS)
    own, seen = (
        [list(accumulate(lengths[first : first + _MOST_SPANS])) for first in firsts]
        for lengths in (spans.query_lengths, spans.key_lengths)
    )
    parts = (states.split([ends[-1] for ends in part]) for states, part in ((query, own), (key, seen), (value, seen)))
    outputs = [_attention(*part, scale) for part in zip(*parts, own, seen, strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attention(query: Tensor, key: Tensor, value: Tensor, own: list[int], seen: list[int], scale: float) -> Tensor:
    """`own`, `seen`: where the queries and the keys of each span end."""
    return torch_npu.npu_fusion_attention(
        query, key, value, head_num=query.shape[1], input_layout="TND", atten_mask=_hidden(query.device), scale=scale,
        actual_seq_qlen=own, actual_seq_kvlen=seen, sparse_mode=_CAUSAL_TO_THE_LAST_KEY,
    )[0]


@lru_cache
def _hidden(device: torch.device) -> Tensor:
    return torch.ones(_MASK_SIDE, _MASK_SIDE, dtype=torch.bool).triu(1).to(device)


def fuse(model: nn.Module) -> nn.Module:
    """Layers of known classes become ones of a subclass, in place: only their forward pass differs."""
    for module in model.modules():
        kind = type(module)
        choose = _FUSED.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None
        if choose and (forward := choose(module)):
            module.__class__ = _with(forward, kind)
    return model


def rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """In float32 inside. The kernel wants both in one dtype; the result is in the wider one, as without it."""
    dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
    return torch_npu.npu_rms_norm(hidden_states.to(dtype), self.weight.to(dtype), epsilon=self.variance_epsilon)[0]


def gated_unit(self: Any, hidden_states: Tensor) -> Tensor:
    """SwiGLU (arXiv 2002.05202) between linear layers that something may have wrapped."""
    both = torch.cat([self.gate_proj(hidden_states), self.up_proj(hidden_states)], dim=-1)
    return self.down_proj(torch_npu.npu_swiglu(both, dim=-1))


def rotated(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotary positions (arXiv 2104.09864): [B, H, T, D] and [B, K, T, D] by angles [B, T, D], in the wider of their dtypes."""
    dtype = torch.promote_types(query.dtype, cosine.dtype)
    cosine, sine = (part.unsqueeze(unsqueeze_dim).to(dtype) for part in (cosine, sine))
    query, key = (torch_npu.npu_rotary_mul(states.to(dtype), cosine, sine, rotary_mode="half") for states in (query, key))
    return query, key


def _norm(module: nn.Module) -> Forward:
    return rms_norm


def _unit(module: nn.Module) -> Forward | None:
    return gated_unit if isinstance(module.act_fn, nn.SiLU | SiLUActivation) else None


def _rotary(module: nn.Module) -> Forward | None:
    """Not where another function rotates, which takes three axes apart first (Qwen2.5-VL's in transformers 5.5)."""
    forward = type(module).forward
    return _with_rotation(forward) if _ROTATE in forward.__code__.co_names else None


_FUSED: dict[str, Callable[[nn.Module], Forward | None]] = {
    f"{family}{layer}": choose
    for family in ("Llama", "Qwen2", "Qwen3", "Qwen2_5_VL")
    for layer, choose in (("RMSNorm", _norm), ("MLP", _unit), ("Attention", _rotary))
}


@lru_cache
def _with_rotation(forward: FunctionType) -> Forward:
    """The same function, to which one name of its module means the kernel. The module stays as it is, for everyone else."""
    names = {**forward.__globals__, _ROTATE: rotated}
    bound = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    bound.__kwdefaults__ = forward.__kwdefaults__
    return bound


@lru_cache
def _with(forward: Forward, kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Npu{kind.__name__}", (kind,), {"forward": forward})
