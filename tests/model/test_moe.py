"""Mixtures of experts in training: the numbers of transformers in every layout, grouped products, routers, what is refused."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from math import log

import pytest
import torch
from metrics_page import undocumented
from run_files import settings
from saving import published, save
from test_layouts import ALONE, SHARED, actor_of, alone, apart, batch_of, gradient_of, padded
from test_layouts import _one_thread as _one_thread
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter, load_balancing_loss_func

from rlcore import registry
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.config.schema import RunConfig
from rlcore.config.sections import RolloutConfig
from rlcore.errors import ConfigError
from rlcore.model import experts
from rlcore.model.packing import microbatches
from rlcore.model.resolved import ResolvedModel
from rlcore.model.routing import Router, RoutingWatch, replace_routers, routers_of
from rlcore.rollout import sampler as torch_sampler
from rlcore.types import Batch, Sampling

CPU, CONFIG = torch.device("cpu"), AlgorithmConfig(kl_coef=0.1)


@pytest.fixture(scope="module")
def folder(models):
    """Twelve experts: more than one digit, and some without a token."""
    folder = models / "moe"
    registry.load("models", "tiny_qwen3_moe")(folder, hidden_size=64, layers=2, experts=12, expert_size=16)
    return folder


@pytest.fixture(scope="module")
def family(folder):
    return registry.load("families", "qwen3_moe")(folder)


@pytest.fixture(scope="module")
def batch(family):
    return batch_of(family)


def computed(family, folder, grouped, cap=4096):
    actor = actor_of(family, folder, CONFIG, cap)
    experts.choose(actor.model, grouped, CPU, torch.float32)
    return actor


def test_every_layout_has_the_padded_gradient_and_the_same_statistics(family, folder, batch):
    _, yardstick = padded(family, folder, batch, CONFIG)
    reports = []
    for layout, caps in ((batch, SHARED), (alone(batch), ALONE)):
        for count, cap in caps.items():
            metrics, gradient = gradient_of(computed(family, folder, None, cap), layout)
            assert apart(gradient, yardstick) < 5e-6, (len(layout.groups), count)
            reports.append({name: value for name, value in metrics.items() if name.startswith("moe/")})
    assert len(reports[0]) == 5 and all(report == pytest.approx(reports[0], rel=1e-5) for report in reports)


def test_a_grouped_product_is_the_loop(family, folder, batch):
    loop, grouped = (computed(family, folder, one) for one in (False, True))
    assert grouped.model.get_experts_implementation()[""] == "grouped_mm"
    assert (loop.logprobs(batch) - grouped.logprobs(batch)).abs().max() < 1e-6
    gradients = [gradient_of(actor, batch)[1] for actor in (loop, grouped)]
    assert not torch.equal(*gradients) and apart(*gradients) < 1e-6


def test_it_is_used_where_the_device_has_it_and_refused_where_it_is_asked_for_and_missing(family, folder, monkeypatch):
    def broken(*_, **__):
        raise NotImplementedError("no such\nkernel")

    def wrong(states, weights, offs):
        return (states @ weights[0]) + 0 * weights.sum()

    model = family.load(folder, torch.float32)
    experts.choose(model, None, CPU, torch.float32)
    assert model.get_experts_implementation()[""] == "grouped_mm"
    for product, why in ((broken, "no such kernel"), (wrong, r"its result is off by \d"), (None, "has no torch.nn.functional")):
        monkeypatch.setattr(torch.nn.functional, "grouped_mm", product)
        with pytest.raises(ConfigError, match=rf"model\.groupgemm: this cpu .*: .*{why}.*; set it to false"):
            experts.choose(model, True, CPU, torch.float32)
        experts.choose(model, None, CPU, torch.float32)
        assert model.get_experts_implementation()[""] == "eager"


def test_a_dense_model_has_nothing_to_group(tiny_llama):
    dense = registry.load("families", "llama")(tiny_llama).load(tiny_llama, torch.float32)
    experts.choose(dense, None, CPU, torch.float32)
    with pytest.raises(ConfigError, match=r"model\.groupgemm: a llama has no experts; remove it"):
        experts.choose(dense, True, CPU, torch.float32)


# routers


def test_routers_compute_in_float32_in_a_bf16_model(family, folder):
    states = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    (router, _), (sampling, _) = map(routers_of, (
        family.load(folder, torch.bfloat16), family.widen(torch_sampler._load(folder, torch.bfloat16))
    ))  # fmt: skip
    logits, weights, chosen = router(states)
    exact = (states.double() @ router.weight.double().T).softmax(-1).topk(2)
    assert logits.dtype == weights.dtype == torch.float32 and torch.equal(chosen, exact.indices)
    assert torch.allclose(weights.double(), exact.values / exact.values.sum(-1, keepdim=True), atol=1e-6)
    assert torch.equal(sampling(states)[0], logits)


def test_a_router_is_that_of_transformers(family, folder):
    model = family.load(folder, torch.float32)
    for normalized in (True, False):
        config = deepcopy(model.config)
        config.norm_topk_prob = normalized
        block = torch.nn.Module()
        block.gate = theirs = Qwen3MoeTopKRouter(config)
        torch.nn.init.normal_(theirs.weight)
        replace_routers(block)
        states = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
        assert isinstance(block.gate, Router) and block.gate.weight is theirs.weight
        assert all(torch.allclose(*pair) for pair in zip(block.gate(states), theirs(states), strict=True))


def test_statistics_are_those_of_the_tokens_that_count(family, folder, batch):
    """Against transformers' loss of one layer over the positions that predict these tokens, picked by hand."""
    model = family.load(folder, torch.float32)
    watched, logits = RoutingWatch(model), {router: [] for router in routers_of(model)}
    for router, seen in logits.items():
        router.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output[0].detach()))
    places = []
    watched.begin()
    for packed in microbatches(batch, SHARED[2]):
        mask = batch.loss_mask[packed.index]
        with watched.over(packed, mask), torch.no_grad():
            family.hidden(model, packed)
        places.append(packed.predictors[mask])
    family.hidden(model, packed)  # not watched
    found = watched.end().metrics()
    each = [torch.cat([one[at] for one, at in zip(seen, places, strict=False)]) for seen in logits.values()]
    assert found["moe/balance_loss"] == pytest.approx(sum(float(load_balancing_loss_func((one,), 12, 2)) for one in each) / 4)
    loads = [torch.bincount(one.topk(2).indices.flatten(), minlength=12) for one in each]
    assert found["moe/load_max"] == pytest.approx(max(float(load.max() / load.float().mean()) for load in loads))
    idle = sum(int((load == 0).sum()) for load in loads) / 24
    assert found["moe/idle_experts"] == pytest.approx(idle) and idle > 0
    entropies = torch.cat([torch.distributions.Categorical(logits=one).entropy() for one in each])
    assert found["moe/router_entropy"] == pytest.approx(float(entropies.mean())) and float(entropies.mean()) < log(12)


def test_layers_that_run_again_in_the_backward_pass_count_once(family, folder, batch):
    once, twice = (computed(family, folder, None) for _ in range(2))
    twice.model.gradient_checkpointing_enable({"use_reentrant": False})
    twice.model.train()
    first, second = (actor.step(batch_weighted(actor, batch)).routing for actor in (once, twice))
    assert first.tokens == second.tokens == int(batch.loss_mask.sum())
    assert torch.allclose(first.sums, second.sums) and int(first.sums[:, :12].sum()) == 2 * 2 * first.tokens


def batch_weighted(actor, batch):
    (step,) = actor.schedule.steps(batch, actor.objective, 0)
    return step


# weights


def test_a_checkpoint_and_an_engine_have_each_expert(family, folder, batch, backend, tmp_path):
    actor = computed(family, folder, None)
    actor.update(batch)
    save(actor, tmp_path)
    again = computed(family, folder, None)
    again.load(tmp_path)
    assert torch.equal(again.logprobs(batch), actor.logprobs(batch)) and again.update(batch) == actor.update(batch)
    engine = torch_sampler.build(family, folder, backend, RolloutConfig(), torch.float32, 64, 0)
    receipt = engine.load_weights(actor.weights(), 1)
    assert receipt.tensors == 2 + 2 * (9 + 12 * 3)
    drawn = Batch.of(engine.generate([batch.groups[0].prompt], Sampling(4, 6, temperature=0.9)))
    assert torch.allclose(actor.logprobs(drawn), drawn.rollout_logprobs, atol=1e-5)


def test_lora_trains_attention_and_refuses_experts(folder, backend):
    def trainable(**lora):
        config = settings(folder, model={"path": str(folder), "precision": "fp32", "lora": {"rank": 2, **lora}})
        resolved = ResolvedModel(RunConfig.model_validate(config), backend)
        return resolved.trainable(resolved.load(folder))

    for targets in ("all-linear", ["q_proj", "gate_proj"], ["experts.3.down_proj"]):
        with pytest.raises(ConfigError, match=r"lora\.targets: .* names layers of the experts, .* others \(k_proj, o_proj, q_"):
            trainable(targets=targets)
    learning = {name for name, weight in trainable(targets=["q_proj"]).named_parameters() if weight.requires_grad}
    assert learning == {f"model.layers.{n}.self_attn.q_proj.lora_{half}.default.weight" for n in range(2) for half in "AB"}


def test_what_is_reported_is_documented(family, folder, batch):
    metrics = computed(family, folder, None).update(replace(batch))
    assert not undocumented(name for name in metrics if name.startswith("moe/"))


def test_a_checkpoint_is_what_transformers_reads(family, folder, tmp_path):
    """Published names, twelve experts: "10" and "11" come before "2" as text."""
    model = family.load(folder, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(published(model, family, tmp_path), dtype=torch.float32)
    assert all(torch.equal(weight, theirs.get_parameter(name)) for name, weight in model.named_parameters())
