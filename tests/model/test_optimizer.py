"""The optimizer step: learning rate, checks, and peak memory with checkpointed layers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlcore import registry
from rlcore.algorithms.loss import objective
from rlcore.algorithms.schedule import MinibatchSchedule
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.config.sections import OptimizerConfig
from rlcore.errors import NonFinite
from rlcore.model.actor import TorchActor
from rlcore.model.forward import ForwardSettings
from rlcore.model.loaded import LoadedModel
from rlcore.model.optimizer import StepStatistics, combined, learning_rate
from rlcore.model.resolved import _checkpoint_layers
from rlcore.types import Batch, Group, Row, Sample, TokenLoss

SETTINGS = ForwardSettings(torch.device("cpu"), torch.float32, 4096, 1.0)


@pytest.fixture(scope="module")
def family(tiny_llama):
    return registry.load("families", "llama")(tiny_llama)


def batch_of(family, length=3, **fields):
    groups = []
    for number in range(2):
        prompt = family.encode(Row(f"row:{number}", [{"role": "user", "content": f"{number} + 4?"}]))
        ids = [torch.arange(10, 10 + length).tolist(), [20, 30]]
        groups.append(Group(prompt, [Sample(each, [-5.0] * len(each), "", "stop", 0) for each in ids]))
    batch = Batch.of(groups)
    return replace(batch, advantages=batch.per_token(torch.tensor([1.0, -1.0, 0.5, -0.5])), **fields)


@pytest.fixture
def actor(family, tiny_llama):
    model = family.load(tiny_llama, torch.float32)
    return TorchActor(
        LoadedModel(model, family), SETTINGS, objective(AlgorithmConfig(), 8), OptimizerConfig(lr=1e-3), MinibatchSchedule(1)
    )


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
def test_a_number_that_is_none_names_its_sample_and_leaves_the_weights(actor, family, field, value, name):
    batch = batch_of(family)
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


def test_a_gradient_that_is_none_names_its_weight(actor, family):
    weight = actor.model.model.layers[1].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = weight.clone()
    with pytest.raises(NonFinite, match=r"gradient .* first in model.layers.1.mlp.up_proj.weight\); its prompts: row:0, row:1"):
        actor.update(batch_of(family))
    assert torch.equal(before, weight)


def test_checkpointed_layers_run_again_in_the_backward_pass_and_change_no_number(family, tiny_llama):
    runs, results = [], []
    for checkpointed in (False, True):
        model = family.load(tiny_llama, torch.float32)
        if checkpointed:
            _checkpoint_layers(model)
        count = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        actor = TorchActor(
            LoadedModel(model, family),
            SETTINGS,
            objective(AlgorithmConfig(), 8),
            OptimizerConfig(lr=1e-3),
            MinibatchSchedule(1),
        )
        results.append(actor.update(batch_of(family)))
        runs.append(len(count))
    assert runs == [1, 2]
    assert results[0] == pytest.approx(results[1])


def test_a_batch_of_masked_samples_takes_a_step_without_a_gradient(actor, family):
    batch = batch_of(family)
    metrics = actor.update(replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)))
    assert metrics["grad_norm"] == 0.0


# the optimizer


def actor_of(family, folder, schedule=None, kind=None, **settings):
    model = family.load(folder, torch.float32)
    config = OptimizerConfig(**{"lr": 1e-3, **settings})
    return TorchActor(
        LoadedModel(model, family), SETTINGS, kind or objective(AlgorithmConfig(), 8), config, schedule or MinibatchSchedule(1)
    )


def moments(actor):
    """First and second moments, flattened."""
    states = actor.learner.optimizer.state.values()
    return [torch.cat([state[name].flatten() for state in states]) for name in ("exp_avg", "exp_avg_sq")]


def flat_weights(actor):
    return torch.cat([weight.detach().flatten().clone() for weight in actor.model.parameters()])


def test_a_gradient_beyond_the_limit_is_scaled_down_to_it(family, tiny_llama):
    limits = (1e-3, 1e9)
    clipped, whole = (actor_of(family, tiny_llama, max_grad_norm=limit) for limit in limits)
    norms = [one.update(batch_of(family))["grad_norm"] for one in (clipped, whole)]
    assert norms[0] == norms[1] > 1e-3, "what is reported is the norm before"
    assert moments(clipped)[0].norm() == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert moments(whole)[0].norm() == pytest.approx(0.1 * norms[1], rel=1e-4)


def test_moments_decay_by_the_betas(family, tiny_llama):
    actor = actor_of(family, tiny_llama, betas=(0.6, 0.0), max_grad_norm=1e9)
    actor.update(batch_of(family))
    first, second = moments(actor)
    assert torch.allclose(second, (first / 0.4).square(), rtol=1e-4)


def test_the_first_step_of_a_warm_up_is_taken_at_the_rate_that_is_reported(family, tiny_llama):
    """AdamW's first step moves a weight by the learning rate, whatever its gradient."""
    actor = actor_of(family, tiny_llama, lr=1e-2, warmup_steps=4, eps=1e-12)
    before = flat_weights(actor)
    assert actor.update(batch_of(family))["lr"] == 2.5e-3
    assert (flat_weights(actor) - before).abs().max() == pytest.approx(2.5e-3, rel=1e-3)
    assert actor.update(batch_of(family))["lr"] == 5e-3


def test_weights_decay_and_vectors_do_not(family, tiny_llama):
    """With zero gradients only weight decay changes weights."""
    actor = actor_of(family, tiny_llama, lr=1e-2, weight_decay=0.5)
    before = {name: weight.detach().clone() for name, weight in actor.model.named_parameters()}
    batch = batch_of(family)
    actor.update(replace(batch, advantages=torch.zeros_like(batch.advantages)))
    assert {weight.ndim for weight in before.values()} == {1, 2}
    for name, weight in actor.model.named_parameters():
        factor = 1.0 if weight.ndim == 1 else 1 - 1e-2 * 0.5
        assert torch.allclose(weight, before[name] * factor, rtol=1e-6, atol=0), name


# several optimizer steps


def tally_of(norm, lr, **values):
    statistics = StepStatistics()
    for name, numbers in values.items():
        numbers = torch.tensor(numbers)
        statistics.add(TokenLoss(numbers, {f"{name}/mean": numbers}, {f"{name}/max": numbers}, {f"{name}/ess": numbers}))
    statistics.common = {"grad_norm": norm, "lr": lr}
    return statistics


def test_several_steps_report_what_one_over_all_their_tokens_would():
    steps = [(tally_of(1.0, 0.1, a=[1.0, 2.0, 6.0]), 3.0), (tally_of(0.0, 0.2), 0.0), (tally_of(4.0, 0.3, a=[5.0]), 1.0)]
    together = tally_of(0.0, 0.0, a=[1.0, 2.0, 6.0, 5.0]).metrics(4.0)
    for order in (steps, [steps[1], steps[0], steps[2]]):
        told = combined(order)
        assert told == pytest.approx(together | {"grad_norm": 2.5, "lr": 0.3})
        assert (told["a/mean"], told["a/max"]) == (3.5, 6.0)


def test_steps_that_had_nothing_to_learn_from_report_no_more_than_that():
    assert combined([(tally_of(0.0, 0.1), 0.0), (tally_of(0.0, 0.2), 0.0)]) == {"grad_norm": 0.0, "lr": 0.2}


@pytest.mark.parametrize("masked", ["the first group", "the last group"])
def test_a_share_without_a_token_that_counts_hides_nothing_of_the_others(family, tiny_llama, masked):
    batch, reports = batch_of(family), []
    lost = batch.places([0 if masked == "the first group" else 1])
    batch.loss_mask[lost] = False
    for schedule in (MinibatchSchedule(2, minibatches=2), MinibatchSchedule(1)):
        reports.append(actor_of(family, tiny_llama, schedule, lr=1e-9).update(batch))
    assert reports[0].keys() == reports[1].keys() >= {"actor/pg_loss", "mismatch/mean", "mismatch/ess", "actor/entropy"}
    assert reports[0] == pytest.approx(reports[1], rel=1e-4)


def test_masked_tokens_are_in_no_number(family, tiny_llama):
    """One sample of four is masked; the others are compared with NumPy."""
    actor, batch = actor_of(family, tiny_llama), batch_of(family)
    kept = (batch.sequence != 1).numpy()
    batch = replace(batch, loss_mask=torch.from_numpy(kept), rollout_logprobs=torch.linspace(-9, -3, len(kept)))
    logprobs = actor.logprobs(batch).double().numpy()
    told = actor.update(batch)
    gap, advantages = (logprobs - batch.rollout_logprobs.numpy())[kept], batch.advantages.double().numpy()[kept]
    weights = np.exp(gap)
    assert told["mismatch/mean"] == pytest.approx(np.abs(gap).mean(), rel=1e-4)
    assert told["mismatch/max"] == pytest.approx(np.abs(gap).max(), rel=1e-4)
    assert told["mismatch/k3"] == pytest.approx((weights - 1 - gap).mean(), rel=1e-4)
    assert told["mismatch/ess"] == pytest.approx(weights.sum() ** 2 / len(gap) / (weights**2).sum(), rel=1e-4)
    assert told["actor/pg_loss"] == pytest.approx(-advantages.mean(), rel=1e-4)


# minibatches


@pytest.mark.parametrize(("groups", "minibatches"), [(8, 4), (5, 4), (3, 4), (1, 4), (7, 2), (4, 1), (0, 3)])
def test_there_are_as_many_optimizer_steps_as_the_schedule_counts_on(groups, minibatches):
    shares = list(MinibatchSchedule(100, minibatches, epochs=2).minibatches_of(groups, done=6))
    assert len(shares) == 2 * minibatches
    for epoch in (shares[:minibatches], shares[minibatches:]):
        sizes = [len(share) for share in epoch]
        assert max(sizes) - min(sizes) <= 1
        assert sorted(group for share in epoch for group in share) == list(range(groups))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo", "rloo"])
def test_an_empty_share_counts_in_the_schedule_and_moves_nothing(family, tiny_llama, name):
    """One group in four minibatches: three optimizer steps are empty."""
    batch, kind = batch_of(family).select([0]), objective(AlgorithmConfig(name=name), 8)
    spread = actor_of(family, tiny_llama, MinibatchSchedule(8, minibatches=4), kind, weight_decay=0.1)
    alone = actor_of(family, tiny_llama, MinibatchSchedule(8), kind, weight_decay=0.1)
    for step in (1, 2):
        reports = [one.update(batch) for one in (spread, alone)]
        assert reports[0] == pytest.approx(reports[1])
        assert (spread.learner.steps, alone.learner.steps) == (4 * step, step)
    assert torch.equal(flat_weights(spread), flat_weights(alone))
    assert all(torch.equal(mine, other) for mine, other in zip(moments(spread), moments(alone), strict=True))
