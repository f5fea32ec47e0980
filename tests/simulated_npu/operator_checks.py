"""Checks that the device's own operators match torch's, and that a model using them is unchanged. Run by session.py."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch_npu
from rlcore_backends.npu import operators
from torch.nn import functional
from torch_npu import dispatch
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from rlcore import registry
from rlcore.config.sections import LoraConfig
from rlcore.model import loading, lora
from rlcore.model.attention import NAME, packed_attention, ragged_attention
from rlcore.types import Packed, Segment

NPU = registry.load("backends", "npu")
HERE = NPU().device(0)
ROWS = (Segment(0, 30, (8, 9, 1)), Segment(48, 20, ())), (Segment(0, 5, (3, 3)), Segment(11, 1, (4, 7)))  # micro-batches
HEADS, KEY_HEADS, SIZE = 4, 2, 8
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}  # relative norm of the difference
SIGHTED = {"vision_layers": 1, "vision_hidden_size": 32}
FAMILIES = {"tiny_llama": {}, "tiny_qwen3": {}, "tiny_qwen2_vl": SIGHTED, "tiny_qwen2_5_vl": SIGHTED, "tiny_qwen3_vl": SIGHTED}


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours, theirs, dtype=torch.float32):
    for one, other in zip(ours, theirs, strict=True):
        one, other = one.detach().cpu().double(), other.detach().cpu().double()
        assert one.shape == other.shape and (one - other).norm() / other.norm() <= CLOSE[dtype]


def ran():
    return {name.removeprefix("npu::"): count for name, count in dispatch.counts.items() if name.startswith("npu::")}


def with_gradients(function: Callable, *inputs):
    """The result, and the gradients of a loss that weights its elements differently."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    result = function(*inputs)
    (result * numbers(*result.shape, seed=9).to(result)).sum().backward()
    return result, *(tensor.grad for tensor in inputs)


def turned(states, cosine, sine):
    """Rotate pairs of numbers as complex numbers."""
    pairs = torch.complex(*states.chunk(2, -1)) * torch.complex(cosine.chunk(2, -1)[0], sine.chunk(2, -1)[0])
    return torch.cat([pairs.real, pairs.imag], dim=-1)


@pytest.mark.parametrize("dtype", CLOSE)
def test_operators_compute_what_torch_does(dtype):
    states, weight = numbers(3, 5, 6).to(dtype), numbers(6, seed=1).to(dtype)
    ours = with_gradients(lambda *given: torch_npu.npu_rms_norm(*given, epsilon=1e-3)[0], states.to(HERE), weight.to(HERE))
    theirs = with_gradients(lambda x, w: functional.rms_norm(x, (6,), w, 1e-3), states.double(), weight.double())
    assert_close(ours, theirs, dtype)
    ours = with_gradients(partial(torch_npu.npu_swiglu, dim=1), numbers(3, 4, 6).to(dtype).to(HERE))
    theirs = with_gradients(lambda x: functional.silu(x[:, :2]) * x[:, 2:], numbers(3, 4, 6).to(dtype).double())
    assert_close(ours, theirs, dtype)
    angles = numbers(1, 1, 7, SIZE // 2).repeat(1, 1, 1, 2)
    angles = [part.to(dtype) for part in (angles.cos(), angles.sin())]
    states = numbers(1, HEADS, 7, SIZE).to(dtype)
    rotate = partial(torch_npu.npu_rotary_mul, r1=angles[0].to(HERE), r2=angles[1].to(HERE))
    theirs = with_gradients(lambda x: turned(x, *(part.double() for part in angles)), states.double())
    assert_close(with_gradients(rotate, states.to(HERE)), theirs, dtype)


def attended(attention, device, dtype, rows=ROWS):
    """Attention outputs of rows that share one projection, and the projection's summed gradient."""
    projection = numbers(16, (HEADS + 2 * KEY_HEADS) * SIZE, seed=3).to(dtype).to(device).requires_grad_()
    outputs = []
    for seed, segments in enumerate(rows):
        states = numbers(sum(segment.tokens for segment in segments), 16, seed=seed).to(dtype).to(device) @ projection
        states = (states / 4).unflatten(1, (-1, SIZE)).transpose(0, 1)[None].split([HEADS, KEY_HEADS, KEY_HEADS], dim=1)
        output, _ = attention(torch.nn.Module(), *states, None, segments=segments, scaling=0.3)
        (output * numbers(*output.shape, seed=9).to(output)).sum().backward()
        outputs.append(output)
    return *outputs, projection.grad


ATTENTION = partial(ragged_attention, operators.attention)


@pytest.mark.parametrize("dtype", CLOSE)
def test_attention_over_packed_rows_is_the_yardsticks(dtype):
    """Prompts shared by several, one or no responses; two query heads per key head; gradients of two micro-batches."""
    assert_close(attended(ATTENTION, HERE, dtype), attended(packed_attention, "cpu", torch.float64), dtype)


def test_a_row_of_more_spans_than_a_call_takes_is_several_calls(monkeypatch):
    whole = attended(ATTENTION, HERE, torch.float32)
    monkeypatch.setattr(operators, "_MOST_SPANS", 2)
    dispatch.counts.clear()
    assert_close(attended(ATTENTION, HERE, torch.float32), whole)
    assert ran() == {"npu_fusion_attention": 3 + 3}, "of 5 and 6 spans"


def test_after_the_first_layer_nothing_is_moved_between_host_and_device():
    states = [numbers(1, heads, 68, SIZE).to(HERE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    for _ in range(2):
        dispatch.counts.clear()
        ATTENTION(torch.nn.Module(), *states, None, segments=ROWS[0])
    assert ran() and not {"aten::_to_copy", "aten::_copy_from", "aten::_local_scalar_dense"} & set(dispatch.counts)


def row(device=HERE):
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    query, key, value = (numbers(5, heads, SIZE).to(device) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    return {
        "query": query, "key": key, "value": value, "head_num": HEADS, "input_layout": "TND", "atten_mask": mask.to(device),
        "actual_seq_qlen": [2, 5], "actual_seq_kvlen": [2, 5], "sparse_mode": 3,
    }  # fmt: skip


MISREAD = {
    "another layout": {"input_layout": "BSND"}, "too few heads": {"head_num": 2}, "half a head": {"head_num": 4.5},
    "no mode": {"sparse_mode": 0}, "causal from the first key": {"sparse_mode": 2}, "dropout": {"keep_prob": 0.9},
    "no mask": {"atten_mask": None}, "a mask of the row's size": {"atten_mask": row()["atten_mask"][:5, :5]},
    "what is seen": {"atten_mask": ~row()["atten_mask"]}, "a mask elsewhere": {"atten_mask": row("cpu")["atten_mask"]},
    "a leading zero": {"actual_seq_qlen": [0, 2, 5]}, "too few queries": {"actual_seq_qlen": [2, 4]},
    "too many keys": {"actual_seq_kvlen": [2, 6]}, "no lengths": {"actual_seq_qlen": None},
    "a tensor of lengths": {"actual_seq_qlen": torch.tensor([2, 5])}, "another's name": {"causal": True},
    "1025 sequences": dict.fromkeys(("actual_seq_qlen", "actual_seq_kvlen"), [1] * 1024 + [5]),
    "two dtypes": {"key": row()["key"].bfloat16()}, "fewer values than keys": {"value": row()["value"][:, :1]},
    "a batch": {"query": row()["query"][None]}, "something added": {"pse": row()["query"]},
    "rows that see nothing": {"inner_precise": 2},
}


@pytest.mark.parametrize("wrong", MISREAD.values(), ids=MISREAD)
def test_attention_refuses_what_the_real_one_would_misread(wrong):
    torch_npu.npu_fusion_attention(**row())
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        torch_npu.npu_fusion_attention(**row() | wrong)


@pytest.mark.parametrize("call", [
    lambda x: torch_npu.npu_rms_norm(x, torch.ones(4, device=HERE), eps=1e-6),
    lambda x: torch_npu.npu_rms_norm(x, torch.ones(3, device=HERE)),
    lambda x: torch_npu.npu_rms_norm(x, torch.ones(4, device=HERE).bfloat16()),
    lambda x: torch_npu.npu_rms_norm(x, torch.ones(4)),
    lambda x: torch_npu.npu_swiglu(x, -2),
    lambda x: torch_npu.npu_swiglu(x.cpu()),
    lambda x: torch_npu.npu_rotary_mul(x, x, x),
    lambda x: torch_npu.npu_rotary_mul(x[None], x[None, :, :2], x[None, :, :2]),
    lambda x: torch_npu.npu_rotary_mul(x[None], x[None].half(), x[None].half()),
    lambda x: torch_npu.npu_rotary_mul(x[None], x[None], x[None], rotary_mode="interleave"),
])  # fmt: skip
def test_operators_refuse_what_the_real_ones_would_misread(call):
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        call(numbers(2, 3, 4).to(HERE))


@pytest.fixture(scope="module", params=FAMILIES)
def kind(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    registry.load("models", request.param)(folder, hidden_size=32, layers=1, **FAMILIES[request.param])
    family = registry.load("families", loading.model_type(folder))(folder)
    return folder, family


@pytest.fixture
def pair(kind):
    """A model and its fused copy."""
    folder, family = kind
    model = family.load(folder, torch.float32).to(HERE)
    return model, NPU().fuse(copy.deepcopy(model))


@pytest.fixture
def run(kind, monkeypatch):
    """A model's output for a row and its gradients, with the device's or the reference attention."""
    family, segments = kind[1], ROWS[1]
    positions = torch.cat([torch.arange(length) + first for length, first in ((5, 0), (3, 5), (3, 5), (1, 0), (4, 1), (7, 1))])

    def through(model, attention=ATTENTION, compute=torch.float32):
        monkeypatch.setitem(AttentionInterface._global_mapping, NAME, attention)
        text = getattr(model.model, "language_model", model.model)
        places = positions if text is model.model else positions.expand(3, -1)
        packed = Packed(torch.arange(len(positions)) + 9, places, segments, *[torch.arange(3)] * 3, "ab", [None] * 2)
        model.zero_grad()
        dispatch.counts.clear()
        with torch.autocast("npu", dtype=compute, enabled=compute != torch.float32):
            hidden = family.hidden(model, packed)
        (hidden * numbers(*hidden.shape, seed=5).to(HERE)).sum().backward()
        return hidden, *(weight.grad for weight in text.parameters() if weight.requires_grad)

    return through


def attention_of(model):
    return next(layer for layer in model.modules() if hasattr(layer, "q_proj"))


def rotation(model):
    """The family's rotary embedding function; transformers 5.5 has another one for Qwen2.5-VL."""
    return getattr(sys.modules[type(attention_of(model)).__module__], "apply_rotary_pos_emb", None)


def counts(model):
    """Kernel calls of a row through the model's one layer and final norm."""
    norms = 3 + 2 * hasattr(attention_of(model), "q_norm")
    kernels = {"npu_rms_norm": norms, "npu_swiglu": 1, "npu_fusion_attention": 1}
    return kernels | ({"npu_rotary_mul": 2} if rotation(model) else {})


def test_a_fused_model_is_the_model_to_rounding(pair, run):
    plain, fused = pair
    theirs = run(plain, packed_attention)
    assert ran() == {}, "what was fused is the copy alone"
    ours = run(fused)
    assert ran() == counts(plain)
    assert_close(ours, theirs)


def test_in_bf16_kernels_round_no_more_than_plain_torch(pair, run):
    plain, fused = pair
    exact = run(plain, packed_attention)
    rounded, ours = run(plain, packed_attention, torch.bfloat16), run(fused, compute=torch.bfloat16)
    assert ran() == counts(plain)
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in rounded]
    errors = [
        sum((one.detach() - true).norm() / true.norm() for one, true in zip(result, exact, strict=True)) / len(exact)
        for result in (ours, rounded)
    ]
    assert errors[0] < 1.2 * errors[1] < 0.05, errors


def test_every_norm_and_gated_unit_is_itself_to_rounding(pair):
    """Including those of a vision encoder."""
    met = 0
    for (name, layer), (_, other) in zip(*(model.named_modules() for model in pair), strict=True):
        if type(layer) is type(other) or hasattr(layer, "q_proj"):
            continue
        assert type(other).__name__ == f"Npu{type(layer).__name__}" and isinstance(other, type(layer)), name
        size = layer.weight.shape[0] if hasattr(layer, "weight") else layer.gate_proj.in_features
        dispatch.counts.clear()
        assert_close(with_gradients(other, numbers(6, size).to(HERE)), with_gradients(layer, numbers(6, size).to(HERE)))
        assert sum(ran().values()) == 1
        met += 1
    assert met >= 4


def test_dtypes_are_those_of_the_model_without_kernels(pair):
    norms = [next(module for name, module in model.named_modules() if name.endswith("layernorm")) for model in pair]
    for weight in CLOSE:
        for states in CLOSE:
            results = [norm.to(weight)(numbers(2, norm.weight.shape[0]).to(HERE, states)) for norm in norms]
            assert results[0].dtype == results[1].dtype
            query, angles = numbers(1, 2, 3, SIZE).to(HERE, states), numbers(1, 3, SIZE).to(HERE, weight)
            assert {rotated.dtype for rotated in operators.rotated(query, query, angles, angles)} == {states}


def test_additions_made_after_fusing_go_through_the_kernels(kind, pair, run):
    """Weight names are unchanged too."""
    family = kind[1]
    assert [name for name, _ in pair[0].named_parameters()] == [name for name, _ in pair[1].named_parameters()]
    results = []
    for model, attention in zip(pair, (packed_attention, ATTENTION), strict=True):
        tower = family.vision_tower(model)
        frozen = [name for name, layer in model.named_modules() if tower and layer in [*tower.modules()]]
        model = lora.attach(model, LoraConfig(rank=2), family.head(model), frozen)
        for number, (_, weight) in enumerate(lora.lora_weights(model)):
            weight.data.copy_(numbers(*weight.shape, seed=number) / 20)
        results.append(run(model, attention))
    assert ran() == counts(pair[0]) and len(results[0]) == 1 + 2 * 7, "two additions to each of seven weights"
    assert_close(*reversed(results))


def test_a_model_of_shapes_alone_is_fused(kind, pair, run):
    folder, family = kind
    meta = NPU().fuse(family.meta_model(folder, torch.float32))
    assert all(weight.is_meta for weight in meta.parameters())
    meta = copy.deepcopy(meta).to_empty(device=HERE)
    meta.load_state_dict(pair[0].state_dict())
    for theirs, ours in zip(pair[0].buffers(), meta.buffers(), strict=True):
        ours.copy_(theirs)
    assert_close(run(meta), run(pair[1]))
    assert ran() == counts(pair[0])


def test_the_rotation_of_other_models_stays(pair):
    plain, fused = (attention_of(model).forward.__globals__.get("apply_rotary_pos_emb") for model in pair)
    assert plain is rotation(pair[0]) is not operators.rotated
    assert fused is (operators.rotated if plain else None)


def test_what_only_looks_alike_stays(pair):
    config = copy.copy(pair[0].config.get_text_config())
    config.hidden_act, config.mlp_bias = "gelu", False
    stranger = type("LlamaRMSNorm", (LlamaRMSNorm,), {"__module__": "elsewhere"})(4)
    layers = torch.nn.Sequential(LlamaMLP(config), stranger, torch.nn.RMSNorm(4), LlamaRMSNorm(4))
    kinds = [type(layer) for layer in layers]
    fused = [type(layer) for layer in NPU().fuse(layers)]
    assert fused[:3] == kinds[:3] and fused[3].__name__ == "NpuLlamaRMSNorm"
    assert NPU().fuse(layers)[3].__class__ is fused[3], "once"


def test_what_is_switched_off_is_not_there(pair, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, packed_attention)
    backend, kinds = NPU(NPU.Options(fused=False)), [type(module) for module in pair[0].modules()]
    backend.prepare()
    assert AttentionInterface._global_mapping[NAME] is packed_attention
    assert [type(module) for module in backend.fuse(pair[0]).modules()] == kinds
    NPU().prepare()
    assert AttentionInterface._global_mapping[NAME] is not packed_attention
