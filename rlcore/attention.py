"""Prefix-shared attention over a packed row, in plain torch: the yardstick for device kernels.

Registered with transformers under `NAME`; a model called with `segments=` reaches it through its attention interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rlcore.packing import Segment

NAME = "rlcore_packed"


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, segments: Sequence[Segment],
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:
    """[1, H, T, D] x 2 [1, K, T, D] -> [1, T, H, D]. Prompt tokens attend causally to their prompt, response tokens to
    their whole prompt and causally to their own response. H is a multiple of K."""
    outputs = []
    for segment in segments:
        begin, end = segment.start, segment.start + segment.prompt
        prompt_key, prompt_value = key[:, :, begin:end], value[:, :, begin:end]
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, begin:end], prompt_key, prompt_value, is_causal=True, scale=scaling, enable_gqa=True
            )
        )
        for length in segment.responses:
            begin, end = end, end + length
            if length:
                mask = torch.ones(length, segment.prompt + length, dtype=torch.bool, device=query.device).tril(segment.prompt)
                outputs.append(
                    scaled_dot_product_attention(
                        query[:, :, begin:end],
                        torch.cat([prompt_key, key[:, :, begin:end]], dim=2),
                        torch.cat([prompt_value, value[:, :, begin:end]], dim=2),
                        attn_mask=mask, scale=scaling, enable_gqa=True,
                    )
                )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)
