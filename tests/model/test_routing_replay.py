"""Routing replay (R3, arXiv 2510.11370): the experts of the rollout, token by token, in every layout of a batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from run_files import settings
from test_layouts import ALONE, SHARED, actor_of, alone, apart, batch_of, gradient_of
from test_layouts import _one_thread as _one_thread
from test_moe import family as family
from test_moe import folder as folder

from rlcore import registry
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.config.schema import RunConfig
from rlcore.config.sections import RolloutConfig
from rlcore.errors import ConfigError, RunError
from rlcore.model.actor import TorchActor
from rlcore.model.resolved import ResolvedModel
from rlcore.model.routing import recorded, routers_of
from rlcore.rollout import sampler as torch_sampler
from rlcore.types import Batch, Group, Sampling

CONFIG = AlgorithmConfig(kl_coef=0.1)
LAYERS, EXPERTS, CHOSEN = 2, 12, 2  # of test_moe's model


@pytest.fixture(scope="module")
def batch(family):
    """Every token of an engine that chose experts at random; those of a prompt's tokens are one sample's for all."""
    random = np.random.default_rng(0)

    def drawn(count):
        odds = random.random((count, LAYERS, EXPERTS))
        return odds.argpartition(CHOSEN, axis=-1)[..., :CHOSEN].astype(np.uint8)

    def routed(group):
        prompt = drawn(len(group.prompt.token_ids))
        return Group(group.prompt, [
            replace(sample, experts=np.concatenate([prompt, drawn(len(sample.token_ids) - 1)])) for sample in group.samples
        ])  # fmt: skip

    plain = batch_of(family)
    return replace(plain, groups=[routed(group) for group in plain.groups])


def actor(family, folder, cap=4096, replay=True, dtype=torch.float32):
    made = actor_of(family, folder, CONFIG, cap)
    return TorchActor(
        made.loaded, replace(made.settings, compute_dtype=dtype), made.objective, made.learner.config, made.schedule,
        routing_replay=replay,
    )  # fmt: skip


def one_by_one(model, batch):
    """Log-probabilities of each sample by transformers' own forward pass, its routers told where to send each token."""
    found = []
    for group in batch.groups:
        for sample in group.samples:
            tokens = torch.tensor([*group.prompt.token_ids, *sample.token_ids.tolist()])
            for layer, router in enumerate(routers_of(model)):
                router.replayed = torch.from_numpy(sample.experts[:, layer].astype(np.int64))
            with torch.no_grad():
                logits = model(tokens[None, :-1], use_cache=False).logits[0] / 0.9
            last = len(group.prompt.token_ids) - 1
            found.append(logits.log_softmax(-1)[last:].gather(1, tokens[last + 1 :, None])[:, 0])
    return torch.cat(found)


def test_every_token_goes_where_the_engine_sent_it_in_every_layout(family, folder, batch):
    wanted = one_by_one(family.widen(torch_sampler._load(folder, torch.float32)), batch)
    own = actor(family, folder, replay=False)
    assert (own.logprobs(batch) - wanted).abs().max() > 0.1
    (_, yardstick), (_, without) = gradient_of(actor(family, folder), batch), gradient_of(own, batch)
    assert apart(yardstick, without) > 0.1
    for layout, caps in ((batch, SHARED), (alone(batch), ALONE)):
        for cap in caps.values():
            replayed = actor(family, folder, cap)
            assert (replayed.logprobs(layout) - wanted).abs().max() < 1e-5
            metrics, gradient = gradient_of(replayed, layout)
            assert apart(gradient, yardstick) < 5e-6
            assert metrics["moe/rerouted"] == pytest.approx(1 - CHOSEN / EXPERTS, abs=0.1)
    assert all(router.replayed is None for router in routers_of(replayed.model))


def test_layers_that_run_again_in_the_backward_pass_are_sent_there_too(family, folder, batch):
    once, twice = actor(family, folder), actor(family, folder)
    twice.model.gradient_checkpointing_enable({"use_reentrant": False})
    twice.model.train()
    assert apart(*(gradient_of(one, batch)[1] for one in (once, twice))) < 1e-6


def drawn_by(family, folder, backend, dtype, prompts, actor, samples=8):
    engine = torch_sampler.build(family, folder, backend, RolloutConfig(), dtype, 200, 0, experts=True)
    engine.load_weights(actor.weights(), 1)
    return Batch.of(engine.generate(prompts, Sampling(samples, 24, temperature=0.9, seed=3)))


def test_the_sampler_says_where_it_sent_each_token(family, folder, batch, backend):
    """In float32 to where the trainer sends it too."""
    replaying, own = actor(family, folder), actor(family, folder, replay=False)
    drawn = drawn_by(family, folder, backend, torch.float32, [group.prompt for group in batch.groups], replaying)
    for group in drawn.groups:
        for sample in group.samples:
            assert sample.experts.dtype == np.uint8
            assert sample.experts.shape == (len(group.prompt.token_ids) + len(sample.token_ids) - 1, LAYERS, CHOSEN)
    assert torch.allclose(replaying.logprobs(drawn), own.logprobs(drawn), atol=1e-6)
    assert replaying.update(replace(drawn, advantages=torch.ones(len(drawn.loss_mask))))["moe/rerouted"] == 0


def test_rounding_reroutes_tokens_and_replay_takes_that_from_the_mismatch(family, folder, batch, backend):
    """In bf16 the engine rounds hidden states otherwise than the trainer."""
    own, replaying = (actor(family, folder, replay=one, dtype=torch.bfloat16) for one in (False, True))
    with torch.no_grad():
        for made in (own, replaying):
            for router in routers_of(made.model):
                router.weight.mul_(0.02)  # a close choice for every token
    drawn = drawn_by(family, folder, backend, torch.bfloat16, [group.prompt for group in batch.groups], own, samples=32)
    far, near = ((made.logprobs(drawn) - drawn.rollout_logprobs).abs() for made in (own, replaying))
    assert near.mean() < 0.8 * far.mean() and near.max() < far.max()
    assert replaying.update(replace(drawn, advantages=torch.ones(len(drawn.loss_mask))))["moe/rerouted"] > 0


def test_what_the_engine_did_not_say_is_an_error(family, folder, batch):
    def changed(change):
        first, *others = batch.groups
        samples = [replace(first.samples[0], experts=change(first.samples[0].experts)), *first.samples[1:]]
        return [Group(first.prompt, samples), *others]

    replaying = actor(family, folder)
    faults = {
        "the engine gave no experts for its tokens": lambda experts: None,
        r"experts up to 12 of \[layers, choices\] \[2, 2\]": lambda experts: np.where(experts == experts.max(), 12, experts),
    }
    for message, change in faults.items():
        with pytest.raises(RunError, match=rf"model\.routing_replay: .*{message}"):
            replaying.logprobs(replace(batch, groups=changed(change)))
    narrow = [Group(one.prompt, [replace(s, experts=s.experts[..., :1]) for s in one.samples]) for one in batch.groups]
    with pytest.raises(RunError, match=r"of \[layers, choices\] \[2, 1\] .* the model has 12 experts and \[2, 2\]"):
        replaying.logprobs(replace(batch, groups=narrow))
    with pytest.raises(RunError, match=r"the engine gave the experts of \d+ tokens, it read \d+"):
        Batch.of(changed(lambda experts: experts[1:]))


def test_a_dense_model_and_an_engine_that_cannot_are_refused(tiny_llama, backend):
    config = settings(tiny_llama, model={"path": str(tiny_llama), "precision": "fp32", "routing_replay": True})
    resolved = ResolvedModel(RunConfig.model_validate(config), backend)
    with pytest.raises(ConfigError, match=r"model\.routing_replay: .* has no experts; remove it"):
        resolved.trainable(resolved.load(tiny_llama))
    for engine in ("vllm", "vllm_server"):
        with pytest.raises(ConfigError, match=r"model\.routing_replay: vLLM gives no experts here; set rollout\.engine=torch"):
            registry.load("rollout_engines", engine)(
                family=resolved.family, folder=tiny_llama, backend=backend, config=RolloutConfig(), dtype=torch.float32,
                max_tokens=64, seed=0, experts=True,
            )  # fmt: skip


def test_nothing_is_recorded_unless_it_is_asked_for(family, folder):
    model = family.load(folder, torch.float32)
    with recorded(model, False) as calls:
        routers_of(model)[0](torch.randn(3, 64))
    assert calls == [] and all(router.record is None for router in routers_of(model))
