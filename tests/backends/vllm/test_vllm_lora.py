"""Syncing LoRA weights alone to an engine that has loaded the base model: vLLM and the plain sampler."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image
from rlcore_backends.vllm import lora as vllm_lora
from torch import Tensor

from rlcore import registry
from rlcore.algorithms import aggregation
from rlcore.algorithms.objective import Objective, tokens
from rlcore.algorithms.schedule import MinibatchSchedule
from rlcore.algorithms.sft import negative_log_likelihood
from rlcore.config.sections import LoraConfig, OptimizerConfig, RolloutConfig
from rlcore.errors import RunError
from rlcore.model import lora
from rlcore.model.actor import TorchActor
from rlcore.model.forward import ForwardSettings
from rlcore.model.loaded import LoadedModel
from rlcore.types import Batch, Row, Sampling

SETTINGS = ForwardSettings(torch.device("cpu"), torch.float32, 256, 1.0)


def publisher(family, folder, **settings):
    """An actor with nonzero LoRA weights, and an engine started for LoRA."""
    model = family.load(folder, torch.float32)
    model = lora.attach(model, LoraConfig(**settings), family.head(model))
    with torch.no_grad():
        for _, tensor in lora.lora_weights(model):
            tensor.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    objective = Objective(negative_log_likelihood, aggregation.token_mean, tokens)
    return TorchActor(
        LoadedModel(model, family), SETTINGS, objective, OptimizerConfig(), MinibatchSchedule(1), publish_lora=True
    )


def engine_of(name, family, folder, backend, **settings):
    build = registry.load("rollout_engines", name)
    return build(family, folder, backend, RolloutConfig(), torch.float32, 128, 0, LoraConfig(**settings))


@pytest.fixture(scope="module", params=["torch", "vllm"])
def engine_name(request):
    if request.param == "vllm":
        pytest.importorskip("vllm")
    return request.param


@pytest.fixture(scope="module", params=["qwen3", "qwen2_5_vl", "qwen3_vl"])
def served(request, engine_name, models, backend):
    """An actor, its engine, and a prompt."""
    settings = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
    kind, folder = request.param, models / f"lora_{request.param}"
    if kind == "qwen3":
        registry.load("models", "tiny_qwen3")(folder, layers=2)
        row = Row("a", [{"role": "user", "content": "3 + 4?"}])
    else:
        registry.load("models", f"tiny_{kind}")(folder, layers=2, vision_layers=2)
        content = [{"type": "image"}, {"type": "text", "text": "Which?"}]
        row = Row("a", [{"role": "user", "content": content}], images=[Image.new("RGB", (112, 112), "red")])
        layers = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj")
        settings["targets"] = [f"language_model.layers.{n}.{layer}" for n in range(2) for layer in layers]
    family = registry.load("families", kind)(folder)
    actor = publisher(family, folder, **settings)
    return actor, engine_of(engine_name, family, folder, backend, **settings), family.encode(row)


@pytest.mark.parametrize(("rank", "room"), [(1, 8), (8, 8), (9, 16), (64, 64), (200, 256)])
def test_an_engine_has_room_for_the_rank_that_is_asked(rank, room):
    assert vllm_lora.engine_arguments(LoraConfig(rank=rank))["max_lora_rank"] == room


def test_an_engine_draws_with_the_additions_it_was_sent(served):
    actor, engine, prompt = served
    for version in (1, 2):
        receipt = engine.load_weights(actor.weights(), version)
        assert receipt.tensors == len(list(actor.weights()))
        assert receipt.bytes == sum(tensor.nbytes for _, tensor in actor.weights())
        drawn = Batch.of(engine.generate([prompt], Sampling(4, 6)))
        assert (actor.logprobs(drawn) - drawn.rollout_logprobs).abs().max() < 1e-4
        with lora.switched_off(actor.model):
            assert (actor.logprobs(drawn) - drawn.rollout_logprobs).abs().max() > 1e-2
        with torch.no_grad():
            for _, tensor in lora.lora_weights(actor.model):
                tensor.mul_(-1.5)


def test_additions_for_a_layer_that_the_engine_lacks_are_named(served):
    actor, engine, _ = served
    wrong = [(name.replace("layers.1.", "layers.7."), tensor) for name, tensor in actor.weights()]
    with pytest.raises(RunError, match=r"weight sync: .*layers\.[17]\."):
        engine.load_weights(wrong, 3)
    engine.load_weights(actor.weights(), 4)


def test_additions_that_landed_wrongly_are_named(served, monkeypatch):
    """A tensor is changed in transit."""
    actor, engine, _ = served
    if type(engine).__name__ == "TorchRollout":
        monkeypatch.setattr(Tensor, "copy_", lambda self, other: self)
        with torch.no_grad():
            next(iter(lora.lora_weights(actor.model)))[1].add_(1)
    else:
        real = vllm_lora.save_file

        def late(tensors, path):
            name = next(iter(tensors))
            real({**tensors, name: tensors[name] + 1}, path)

        monkeypatch.setattr(vllm_lora, "save_file", late)
    with pytest.raises(RunError, match=r"1 different: .*lora_A"):
        engine.load_weights(actor.weights(), 5)


@pytest.mark.parametrize("event", ["the update to version 7", "waking"])
def test_what_no_update_sends_is_named_when_it_changes(served, event):
    actor, engine, _ = served
    engine.load_weights(actor.weights(), 6)
    model = engine._model if hasattr(engine, "_model") else engine._runner.get_model()
    name, buffer = next((name, buffer) for name, buffer in model.named_buffers() if buffer.numel() > 1)
    kept = buffer.clone()

    def spoiling(weights):
        yield from weights
        buffer.mul_(1.01)

    with pytest.raises(RunError, match=rf"{event}.* left the engine without .* different: {re.escape(name)}"):
        if event == "waking":
            engine.pause()
            buffer.zero_()
            engine.resume()
        else:
            engine.load_weights(spoiling(actor.weights()), 7)
    buffer.copy_(kept)
    engine.resume()
    engine.load_weights(actor.weights(), 7)


def test_additions_that_a_sleep_loses_are_named(served):
    actor, engine, prompt = served
    if not hasattr(engine, "_runner"):
        pytest.skip("the plain sampler's additions are weights, which leave the device by a copy of their own")
    engine.load_weights(actor.weights(), 8)
    engine.generate([prompt], Sampling(1, 2))
    engine.pause()
    layer = next(layer for name, layer in engine._runner.get_model().named_modules() if name.endswith("o_proj"))
    kept = layer.lora_b_stacked[0].clone()
    layer.lora_b_stacked[0].zero_()
    with pytest.raises(RunError, match=r"waking .* 1 different: .*o_proj\.lora_b_stacked\[0\];"):
        engine.resume()
    layer.lora_b_stacked[0].copy_(kept)
    engine.resume()
    engine.load_weights(actor.weights(), 9)
    engine.generate([prompt], Sampling(1, 2))
