"""Ascend's fused kernels: attention over packed rows, norms, gated units, rotary positions.

Names and limits are those of torch_npu 2.10.0.post4.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch_npu  # pyright: ignore[reportMissingImports]
from torch import Tensor

from rlcore.model.attention import Ragged

from ..common.fused import Kernels

DTYPES = (torch.float16, torch.bfloat16)  # float32, for comparing devices, stays with plain torch
_MOST_SPANS = 1024  # limit of one kernel call
_MASK_SIDE = 2048  # the one mask serves any length
_CAUSAL_TO_THE_LAST_KEY = 3  # sparse_mode


def attention(query: Tensor, key: Tensor, value: Tensor, spans: Ragged, scale: float) -> Tensor:
    """`rlcore.model.attention.Kernel`: FlashAttention-2 for sequences of different lengths (arXiv 2307.08691)."""
    firsts = range(0, len(spans.query_lengths), _MOST_SPANS)
    own, seen = (
        [list(accumulate(lengths[first : first + _MOST_SPANS])) for first in firsts]
        for lengths in (spans.query_lengths, spans.key_lengths)
    )
    queries, keys, values = (
        states.split([ends[-1] for ends in part]) for states, part in ((query, own), (key, seen), (value, seen))
    )
    outputs = [_attention(*part, scale) for part in zip(queries, keys, values, own, seen, strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attention(query: Tensor, key: Tensor, value: Tensor, own: list[int], seen: list[int], scale: float) -> Tensor:
    """`own`, `seen`: end offsets of each span's queries and keys."""
    return torch_npu.npu_fusion_attention(
        query, key, value, head_num=query.shape[1], input_layout="TND", atten_mask=_hidden(query.device), scale=scale,
        actual_seq_qlen=own, actual_seq_kvlen=seen, sparse_mode=_CAUSAL_TO_THE_LAST_KEY,
    )[0]


@lru_cache
def _hidden(device: torch.device) -> Tensor:
    """Causal mask: true where a query does not see a key."""
    return torch.ones(_MASK_SIDE, _MASK_SIDE, dtype=torch.bool).triu(1).to(device)


def rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Compute in float32. The kernel takes one dtype for both; the result has the wider one, as in plain torch."""
    dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
    return torch_npu.npu_rms_norm(hidden_states.to(dtype), self.weight.to(dtype), epsilon=self.variance_epsilon)[0]


def gated_unit(self: Any, hidden_states: Tensor) -> Tensor:
    """SwiGLU (arXiv 2002.05202) between linear layers, which may be wrapped."""
    both = torch.cat([self.gate_proj(hidden_states), self.up_proj(hidden_states)], dim=-1)
    return self.down_proj(torch_npu.npu_swiglu(both, dim=-1))


def rotated(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Apply rotary positions (arXiv 2104.09864) to [B, H, T, D] and [B, K, T, D] by angles [B, T, D], in the wider of their
    dtypes and back."""
    dtype = torch.promote_types(query.dtype, cosine.dtype)
    cosine, sine = (part.unsqueeze(unsqueeze_dim).to(dtype) for part in (cosine, sine))
    turned = (torch_npu.npu_rotary_mul(states.to(dtype), cosine, sine, rotary_mode="half") for states in (query, key))
    query, key = (states.to(query.dtype) for states in turned)
    return query, key


KERNELS = Kernels("Npu", rms_norm, gated_unit, rotated)
