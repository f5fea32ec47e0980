"""A frozen vision tower reads each image once a step; one that learns reads it in every pass."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from rlcore import registry
from rlcore.algorithms import aggregation
from rlcore.algorithms.sft import negative_log_likelihood
from rlcore.config import OptimizerConfig
from rlcore.learner import Objective, tokens
from rlcore.policy import ForwardSettings, Passes, TorchActor, TorchReference
from rlcore.types import Batch, Group, Row, Sample
from rlcore.vision import ImageCache

SETTINGS = ForwardSettings(torch.device("cpu"), torch.float32, 80, 1.0)


@pytest.fixture(scope="module")
def folder(models):
    registry.load("models", "tiny_qwen2_5_vl")(models / "vision_vl", layers=1, vision_layers=2)
    return models / "vision_vl"


@pytest.fixture(scope="module")
def adapter(folder):
    return registry.load("adapters", "qwen2_5_vl")(folder)


@pytest.fixture(scope="module")
def batch(adapter):
    """Three prompts with two, one and no image, two samples each; the cap above makes several micro-batches of them."""
    groups = []
    for number, colors in enumerate((["red", "blue"], ["green"], [])):
        images = [Image.new("RGB", (112, 56), color) for color in colors]
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": "Which?"}]
        prompt = adapter.encode(Row(str(number), [{"role": "user", "content": parts}], images=images))
        groups.append(Group(prompt, [Sample([9, 10, 11], [0.0] * 3, "", "stop", 0), Sample([20], [0.0], "", "stop", 0)]))
    return Batch.of(groups)


def actor_of(adapter, folder, frozen, cache):
    model = adapter.load(folder, torch.float32)
    adapter.vision_tower(model).requires_grad_(not frozen)
    objective = Objective(negative_log_likelihood, aggregation.token_mean, tokens)
    return TorchActor(model, adapter, SETTINGS, objective, OptimizerConfig(lr=1e-3), Passes(4, minibatches=3, epochs=2), cache)


@pytest.fixture
def read(adapter, monkeypatch):
    """How many images the tower has read, on every call."""
    calls = []
    real = registry.load("adapters", "qwen2_5_vl").hidden

    def counted(self, model, *arguments):
        tower = self.vision_tower(model)
        if not hasattr(tower, "counted"):
            tower.counted = tower.register_forward_hook(lambda _, inputs, __: calls.append(1))
        return real(self, model, *arguments)

    monkeypatch.setattr(type(adapter), "hidden", counted)
    return calls


def test_each_image_is_read_once_for_reference_old_policy_and_every_update(adapter, folder, batch, read):
    cache = ImageCache()
    actor = actor_of(adapter, folder, frozen=True, cache=cache)
    reference = TorchReference(adapter.load(folder, torch.float32), adapter, SETTINGS, cache)
    assert torch.allclose(reference.logprobs(batch), actor.logprobs(batch))
    actor.update(batch)
    assert 1 <= len(read) <= 2, "one call of the tower for each micro-batch with images it has not read"
    assert cache.clear() == 3
    actor.logprobs(batch)
    assert cache.clear() == 3, "a new step reads them again"


def test_kept_embeddings_change_no_number(adapter, folder, batch):
    results = []
    for cache in (None, ImageCache()):
        actor = actor_of(adapter, folder, frozen=True, cache=cache)
        metrics = actor.update(batch)
        results.append((metrics, actor.logprobs(batch)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)


def test_a_tower_that_learns_has_a_gradient(adapter, folder, batch):
    actor = actor_of(adapter, folder, frozen=False, cache=None)
    before = [weight.clone() for weight in adapter.vision_tower(actor.model).parameters()]
    actor.update(batch)
    after = list(adapter.vision_tower(actor.model).parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
