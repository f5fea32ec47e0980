"""The optimizer step: its rate, its checks, and what a step costs in memory with checkpointed layers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rlcore import registry
from rlcore.algorithms.loss import objective
from rlcore.config import AlgorithmConfig, OptimizerConfig
from rlcore.errors import NonFinite
from rlcore.learner import learning_rate
from rlcore.policy import ForwardSettings, Passes, TorchActor
from rlcore.types import Batch, Group, Row, Sample
from rlcore.worker import _checkpoint_layers

SETTINGS = ForwardSettings(torch.device("cpu"), torch.float32, 4096, 1.0)


@pytest.fixture(scope="module")
def adapter(tiny_llama):
    return registry.load("adapters", "llama")(tiny_llama)


def batch_of(adapter, length=3, **fields):
    groups = []
    for number in range(2):
        prompt = adapter.encode(Row(f"row:{number}", [{"role": "user", "content": f"{number} + 4?"}]))
        ids = [torch.arange(10, 10 + length).tolist(), [20, 30]]
        groups.append(Group(prompt, [Sample(each, [-5.0] * len(each), "", "stop", 0) for each in ids]))
    batch = Batch.of(groups)
    return replace(batch, advantages=batch.per_token(torch.tensor([1.0, -1.0, 0.5, -0.5])), **fields)


@pytest.fixture
def actor(adapter, tiny_llama):
    model = adapter.load(tiny_llama, torch.float32)
    return TorchActor(model, adapter, SETTINGS, objective(AlgorithmConfig(), 8), OptimizerConfig(lr=1e-3), Passes(1))


def rates(**settings):
    config = OptimizerConfig(lr=1.0, **settings)
    return [learning_rate(config, step, 11) for step in range(11)]


def test_the_rate_rises_over_the_warm_up_and_stays():
    assert rates(warmup_steps=4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_and_cosine_end_at_min_lr_with_the_last_step():
    assert rates(schedule="linear", min_lr=0.5) == pytest.approx([1 - 0.05 * step for step in range(11)])
    falling = rates(schedule="cosine", min_lr=0.2, warmup_steps=2)
    assert falling[:3] == [0.5, 1.0, 1.0]
    assert falling[6] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2)
    assert falling[10] == pytest.approx(0.2)
    assert learning_rate(OptimizerConfig(lr=1.0, schedule="linear"), 99, 11) == 0.0


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [("advantages", math.nan, "loss"), ("old_logprobs", -200.0, "loss|ratio"), ("old_logprobs", math.inf, "ppo_kl")],
)
def test_a_number_that_is_none_names_its_sample_and_leaves_the_weights(actor, adapter, field, value, name):
    batch = batch_of(adapter)
    values = actor.logprobs(batch) if field == "old_logprobs" else batch.advantages.clone()
    values[4] = value  # the second token of the first row's second sample
    before = [weight.clone() for weight in actor.model.parameters()]
    with pytest.raises(NonFinite, match=rf"the .*({name}).* is not finite .* at token 1 of sample 1 of row:0") as caught:
        actor.update(replace(batch, **{field: values}))
    (token,) = caught.value.report["tokens"]
    assert (token["prompt"], token["sample"], token["token"], token["token_id"]) == ("row:0", 1, 1, 30)
    assert float(token[field]) == pytest.approx(value, nan_ok=True)
    assert all(torch.equal(old, new) for old, new in zip(before, actor.model.parameters(), strict=True))
    assert all(weight.grad is None for weight in actor.model.parameters())
    assert actor.learner.steps == 0


def test_a_gradient_that_is_none_names_its_weight(actor, adapter):
    weight = actor.model.model.layers[1].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = weight.clone()
    with pytest.raises(NonFinite, match=r"gradient .* first in model.layers.1.mlp.up_proj.weight\); its prompts: row:0, row:1"):
        actor.update(batch_of(adapter))
    assert torch.equal(before, weight)


def test_checkpointed_layers_run_again_in_the_backward_pass_and_change_no_number(adapter, tiny_llama):
    runs, results = [], []
    for checkpointed in (False, True):
        model = adapter.load(tiny_llama, torch.float32)
        if checkpointed:
            _checkpoint_layers(model)
        count = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        actor = TorchActor(model, adapter, SETTINGS, objective(AlgorithmConfig(), 8), OptimizerConfig(lr=1e-3), Passes(1))
        results.append(actor.update(batch_of(adapter)))
        runs.append(len(count))
    assert runs == [1, 2]
    assert results[0] == pytest.approx(results[1])


def test_a_batch_of_masked_samples_takes_a_step_without_a_gradient(actor, adapter):
    batch = batch_of(adapter)
    metrics = actor.update(replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)))
    assert metrics["grad_norm"] == 0.0
