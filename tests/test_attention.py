"""What packed attention keeps for the backward pass. That its numbers are right is test_layouts.py's."""

from __future__ import annotations

import contextlib

import pytest
import torch

from rlcore.attention import layout, packed_attention
from rlcore.packing import Segment

SEGMENTS = (Segment(0, 30, (8, 9)), Segment(47, 20, ()))
TOKENS = 67


@pytest.mark.parametrize("rounded", [False, True])
def test_layers_share_one_mask_and_prompts_need_none(rounded):
    """As large as the square of a row, it would outgrow everything else that a layer keeps."""
    kept = set()

    def keep(tensor):
        if tensor.ndim == 4 and tensor.shape[-1] == 30 + 9:  # keys of the longest response
            kept.add((tensor.untyped_storage().data_ptr(), tensor.dtype))
        return tensor

    layout.cache_clear()
    autocast = torch.autocast("cpu", torch.bfloat16) if rounded else contextlib.nullcontext()
    states = [torch.randn(1, heads, TOKENS, 8, requires_grad=True) for heads in (4, 2, 2)]
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [packed_attention(torch.nn.Module(), *states, None, segments=SEGMENTS)[0] for _ in range(3)]
    assert [dtype for _, dtype in kept] == [torch.bfloat16 if rounded else torch.float32]
    rectangles = layout(SEGMENTS, torch.device("cpu"), outputs[0].dtype)
    assert [rectangle.mask is None for rectangle in rectangles] == [True, False]
