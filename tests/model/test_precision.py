"""bf16 training: float32 master weights, bf16 copies for compute, float32 sums. Every test sets the precision explicitly,
so that results do not depend on the CPU."""

from __future__ import annotations

import pytest
import torch
from saving import save
from test_actor import actor, batch, family  # noqa: F401 - fixtures

from rlcore import registry
from rlcore.config.sections import LoraConfig
from rlcore.model import lora
from rlcore.model.loaded import LoadedModel
from rlcore.model.precision import WorkingCopy, hold_frozen, lookup
from rlcore.model.reference import TorchReference
from rlcore.rollout import sampler as torch_sampler

LOW = torch.bfloat16


@pytest.fixture
def rounded(family, tiny_llama):  # noqa: F811
    return actor(family, tiny_llama, LOW)


def run_on(model, working):
    """The weights the model computes with."""
    with working():
        return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_a_model_runs_on_its_weights_rounded_and_keeps_them_whole(rounded):
    kept = {name: weight.clone() for name, weight in rounded.model.named_parameters()}
    for name, weight in run_on(rounded.model, rounded.working).items():
        assert weight.dtype == LOW and torch.equal(weight, kept[name].to(LOW))
    for name, weight in rounded.model.named_parameters():
        assert weight.dtype == torch.float32 and torch.equal(weight, kept[name])


def test_the_copies_follow_the_weights_whoever_changes_them(rounded, batch, tmp_path):  # noqa: F811
    """By an optimizer step (fused: no version counter changes), a checkpoint, or a direct write."""

    def same():
        weights = {name: weight.detach().to(LOW) for name, weight in rounded.model.named_parameters()}
        return all(torch.equal(weight, weights[name]) for name, weight in run_on(rounded.model, rounded.working).items())

    assert same()
    save(rounded, tmp_path)
    before = rounded.logprobs(batch)
    rounded.update(batch)
    assert same() and not torch.equal(rounded.logprobs(batch), before)
    rounded.load(tmp_path)
    assert same() and torch.equal(rounded.logprobs(batch), before)
    with torch.no_grad():
        next(rounded.model.parameters()).mul_(2)
    assert same()


def test_the_copies_are_made_once_an_optimizer_step(rounded, batch, monkeypatch):  # noqa: F811
    made = []
    foreach = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *tensors: made.append(len(tensors[0])) or foreach(*tensors))
    rounded.logprobs(batch)
    for _ in range(2):
        rounded.update(batch)
        rounded.logprobs(batch)
        rounded.logprobs(batch)
    assert len(made) == 2


def test_gradients_of_micro_batches_are_summed_in_float32():
    """In bf16 a sum of equal gradients stops growing at 256 of them."""
    layer = torch.nn.Linear(4, 1, bias=False)
    working, states = WorkingCopy(layer, LOW), torch.ones(1, 4, dtype=LOW)
    with working():
        for _ in range(300):
            layer(states).sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.tolist() == [[300.0] * 4]


def test_so_are_those_of_a_token_that_occurs_often():
    weight = torch.randn(7, 3).to(LOW).requires_grad_()
    token_ids = torch.tensor([2] * 300 + [5])
    rows = lookup(weight, token_ids)
    assert torch.equal(rows, weight[token_ids])
    rows.backward(torch.ones_like(rows))
    assert weight.grad[2].tolist() == [300.0] * 3 and weight.grad[5].tolist() == [1.0] * 3
    assert not weight.grad[[0, 1, 3, 4, 6]].any()


def test_tied_weights_have_one_copy_and_one_gradient(models):
    folder = models / "tied_qwen3"
    registry.load("models", "tiny_qwen3")(folder, hidden_size=64, layers=1)
    model = registry.load("families", "qwen3")(folder).load(folder, torch.float32)
    model.lm_head.weight = model.get_input_embeddings().weight
    with WorkingCopy(model, LOW)():
        assert model.lm_head.weight is model.get_input_embeddings().weight
        (model.lm_head.weight.sum() + model.get_input_embeddings().weight.sum()).backward()
    assert model.lm_head.weight.grad.eq(2).all()


def test_what_does_not_learn_is_held_in_the_compute_dtype(rounded, family, tiny_llama, batch):  # noqa: F811
    """The reference, and the base weights under LoRA; LoRA weights are trained in float32."""
    fixed = TorchReference(LoadedModel(family.load(tiny_llama, torch.float32).requires_grad_(False), family), rounded.settings)
    assert {weight.dtype for weight in fixed.model.parameters()} == {LOW} and not fixed.working.tensors()
    assert torch.equal(fixed.logprobs(batch), rounded.logprobs(batch))
    model = family.load(tiny_llama, torch.float32)
    model = lora.attach(model, LoraConfig(rank=2), family.head(model))
    hold_frozen(model, LOW)
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    assert all((dtype == torch.float32) == (".lora_" in name) for name, dtype in dtypes.items())
    assert set(dtypes.values()) == {LOW, torch.float32}


def test_switching_additions_off_leaves_what_learns_as_it_is(family, tiny_llama):  # noqa: F811
    """FSDP2 fixes a layer's gradient dtype by requires_grad at its first forward pass."""
    model = family.load(tiny_llama, torch.float32)
    model = lora.attach(model, LoraConfig(rank=2), family.head(model))
    asking = [weight.requires_grad for weight in model.parameters()]
    with lora.switched_off(model):
        assert [weight.requires_grad for weight in model.parameters()] == asking
    assert [weight.requires_grad for weight in model.parameters()] == asking


def test_rotary_tables_are_float32_in_a_bf16_model(family, tiny_llama):  # noqa: F811
    """In the trainer and the plain sampler."""
    places, tables = torch.tensor([[0, 1000, 1001]]), []
    sampler = family.widen(torch_sampler._load(tiny_llama, LOW))
    for model in (family.load(tiny_llama, torch.float32), family.load(tiny_llama, LOW), sampler):
        tables.append(model.model.rotary_emb(torch.zeros(1, 3, 8, dtype=model.dtype), position_ids=places))
    for exact, *ours in zip(*tables, strict=True):
        assert all(table.dtype == torch.float32 and torch.equal(table, exact) for table in ours)
