"""Tensors packed attention saves for backward, and the calls a device kernel receives. test_layouts.py tests the values of
plain torch."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rlcore import registry
from rlcore.model import attention
from rlcore.model.attention import layout, packed_attention, ragged, ragged_attention
from rlcore.types import Packed, Segment

SEGMENTS = (Segment(0, 30, (8, 9)), Segment(47, 20, ()))
TOKENS = 67


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_keep_their_inputs_and_output_and_nothing_of_the_size_of_scores(dtype):
    """Quadratic in row length, saved scores or masks would dominate memory."""
    kept = []

    def keep(tensor):
        kept.append((tensor.numel(), tensor.dtype))
        return tensor

    states = [torch.randn(1, heads, TOKENS, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed_attention(torch.nn.Module(), *states, None, segments=SEGMENTS)
    assert sorted(kept) == sorted((TOKENS * heads * 8, dtype) for heads in (4, 2, 2, 4))


@pytest.mark.parametrize("tile_bytes", [1, 2000, 20_000, 2**21])
def test_no_tile_changes_a_number(tile_bytes, monkeypatch):
    """Long spans are split, several pieces of one span and several prompts share tiles, and prompts and responses of any
    lengths are adjacent: all give the softmax over each query's visible keys."""
    monkeypatch.setattr(attention, "TILE_BYTES", tile_bytes)
    layout.cache_clear()
    segments = (Segment(0, 30, (8, 9)), Segment(47, 20, ()), Segment(67, 5, (1, 0, 70, 3)), Segment(146, 1, (40, 40)))
    tokens = sum(segment.tokens for segment in segments)
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, tokens, 8, generator=random, dtype=torch.float64) for heads in (6, 2, 2, 6)]
    found = []
    for way in (packed_attention, partial(ragged_attention, one_by_one)):
        states = [state.clone().requires_grad_() for state in inputs[:3]]
        output, _ = way(torch.nn.Module(), *states, None, segments=segments, scaling=0.3)
        output.backward(inputs[3].transpose(1, 2))
        found.append([output, *(state.grad for state in states)])
    layout.cache_clear()
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def one_by_one(query, key, value, spans, scale):
    """A kernel that computes each span separately in float64."""
    outputs = []
    for number in range(len(spans.query_starts) - 1):
        own, seen = (slice(*starts[number : number + 2].tolist()) for starts in (spans.query_starts, spans.key_starts))
        share = query.shape[1] // key.shape[1]
        q = query[own].double()
        k, v = (states[seen].double().repeat_interleave(share, dim=1) for states in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
        assert (len(q), len(k)) == (spans.query_lengths[number], spans.key_lengths[number])
    return torch.cat(outputs).to(query.dtype)


def test_a_kernel_that_knows_nothing_of_prefixes_computes_the_yardstick():
    """Gradients too, including those of shared keys."""
    random = torch.Generator().manual_seed(0)
    found = []
    for way in (packed_attention, partial(ragged_attention, one_by_one)):
        states = [torch.randn(1, heads, TOKENS, 8, generator=random.manual_seed(heads)) for heads in (4, 2, 2)]
        states[2] = states[2].roll(1)
        for tensor in states:
            tensor.requires_grad_()
        output, _ = way(torch.nn.Module(), *states, None, segments=SEGMENTS, scaling=0.3)
        (output * torch.arange(output.numel()).view_as(output).cos()).sum().backward()
        found.append([output, *(tensor.grad for tensor in states)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_queries_of_ragged_spans_are_the_row_itself():
    spans = ragged(SEGMENTS, torch.device("cpu"))
    assert spans.query_starts.tolist() == [0, 30, 38, 47, TOKENS]
    assert spans.key_starts.tolist() == [0, 30, 68, 107, 127]
    assert spans.keys[30:68].tolist() == [*range(30), *range(30, 38)]
    assert spans.keys[68:107].tolist() == [*range(30), *range(38, 47)]
    assert (spans.query_lengths, spans.key_lengths) == ((30, 8, 9, 20), (30, 38, 39, 20))


@pytest.mark.parametrize(("dtypes", "calls"), [((torch.float32,), 2), ((torch.bfloat16,), 0)])
def test_a_kernel_is_given_rows_in_its_dtypes_only(dtypes, calls, tiny_llama, monkeypatch):
    from transformers import AttentionInterface

    asked = []

    def counted(*arguments):
        asked.append(arguments[0].dtype)
        return one_by_one(*arguments)

    family = registry.load("families", "llama")(tiny_llama)
    packed = Packed(torch.arange(TOKENS), torch.arange(TOKENS), SEGMENTS, *[torch.arange(3)] * 3, ["a"], [None])
    with torch.no_grad():
        model = family.load(tiny_llama, torch.float32)
        expected = family.hidden(model, packed)
        monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, None)  # restored afterwards
        attention.use(counted, dtypes)
        assert torch.allclose(family.hidden(model, packed), expected, atol=1e-5)
    assert asked == [torch.float32] * calls
