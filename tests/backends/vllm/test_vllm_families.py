"""Each vision-language family: a checkpoint of the actor is served by vLLM, which reads images as the trainer does."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from saving import save

from rlcore import registry
from rlcore.algorithms import aggregation
from rlcore.algorithms.objective import Objective, tokens
from rlcore.algorithms.schedule import MinibatchSchedule
from rlcore.algorithms.sft import negative_log_likelihood
from rlcore.config.sections import ModelConfig, OptimizerConfig, RolloutConfig, VisionConfig
from rlcore.errors import ConfigError, RunError
from rlcore.model.actor import TorchActor
from rlcore.model.forward import ForwardSettings
from rlcore.model.loaded import LoadedModel
from rlcore.model.loading import family_of
from rlcore.model.vision import VisionEncoder
from rlcore.types import Batch, Group, Row, Sample, Sampling

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

SETTINGS = ForwardSettings(torch.device("cpu"), torch.float32, 512, 1.0)
SAVED = VisionConfig(max_pixels=40 * 32**2)  # the limits of the run that wrote the checkpoint
LIMITS = VisionConfig(min_pixels=5 * 32**2, max_pixels=12 * 32**2)  # of the run that goes on with it
GREEDY = Sampling(1, 12, temperature=0)
WRONG = {  # tensors that the engine fuses, repacks, or has in this family alone
    "qwen2_vl": ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight", "visual.blocks.1.mlp.fc1.bias"),
    "qwen2_5_vl": ("model.layers.1.mlp.up_proj.weight", "visual.blocks.1.mlp.gate_proj.weight", "visual.merger.ln_q.weight"),
    "qwen3_vl": (
        "model.language_model.layers.1.self_attn.q_norm.weight", "model.visual.deepstack_merger_list.1.linear_fc2.weight",
        "model.visual.pos_embed.weight",
    ),
}  # fmt: skip


def row(text, *sizes):
    """Images of noise, (height, width) each."""
    random = np.random.default_rng(len(sizes))
    images = [Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return Row(text, [{"role": "user", "content": parts}], images=images)


ROWS = [row("How many circles?", (96, 128)), row("What is 4 + 5?"), row("Which?", (600, 800), (40, 40), (64, 200))]


def answered(family):
    """A batch to learn from."""
    samples = [Sample(ids, [0.0] * len(ids), "", "stop", 0) for ids in ([9, 10, 11], [20, 30])]
    return Batch.of([Group(family.encode(one), samples) for one in ROWS])


def actor_of(kind, folder, limits):
    family = family_of(folder, ModelConfig(path=kind), limits)
    objective = Objective(negative_log_likelihood, aggregation.token_mean, tokens)
    loaded, schedule = LoadedModel(family.load(folder, torch.float32), family), MinibatchSchedule(total_steps=4)
    return TorchActor(loaded, SETTINGS, objective, OptimizerConfig(lr=5e-3), schedule)


@pytest.fixture(scope="module", params=WRONG)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(kind, models, tmp_path_factory):
    """`checkpoints/step_1` of an actor that has taken a step, its tower too."""
    registry.load("models", f"tiny_{kind}")(models / f"families_{kind}", layers=3, vision_layers=3)
    actor, folder = actor_of(kind, models / f"families_{kind}", SAVED), tmp_path_factory.mktemp("step_1")
    actor.update(answered(actor.family))
    save(actor, folder)
    return folder


@pytest.fixture(scope="module")
def served(kind, checkpoint, backend):
    """An actor and an engine, both from the checkpoint."""
    folder = checkpoint / "model"
    actor, build = actor_of(kind, folder, LIMITS), registry.load("rollout_engines", "vllm")
    engine = build(actor.family, folder, backend, RolloutConfig(), torch.float32, 256, 0, image_embeds=True)
    return actor, engine, [actor.family.encode(one) for one in ROWS]


def gap(actor, groups):
    batch = Batch.of(groups)
    return float((actor.logprobs(batch) - batch.rollout_logprobs).abs().max())


def drawn(groups):
    return [sample.token_ids.tolist() for group in groups for sample in group.samples]


def test_a_saved_policy_is_served_under_its_published_names(kind, checkpoint, served):
    actor, engine, prompts = served
    (file,) = (checkpoint / "model").glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        assert {name for name, _ in actor.weights()} == set(stored.keys()) > set(WRONG[kind])
    assert gap(actor, engine.generate(prompts, Sampling(3, 12))) < 1e-4


def test_a_large_image_has_as_many_tokens_in_the_engine_as_in_the_trainer(served):
    """`generate` compares the tokens of each prompt."""
    actor, engine, prompts = served
    placeholder = actor.family.processor.image_token_id
    assert 3 * 5 <= prompts[2].token_ids.count(placeholder) <= 3 * 12 * (32 / 28) ** 2
    assert gap(actor, engine.generate(prompts[2:], Sampling(4, 8))) < 1e-4


def test_another_number_of_tokens_in_the_engine_is_named(served, checkpoint, kind):
    _, engine, prompts = served
    own = family_of(checkpoint / "model", ModelConfig(path=kind)).encode(ROWS[2])
    assert len(own.token_ids) > len(prompts[2].token_ids)
    found = rf"Which\?: the engine read {len(prompts[2].token_ids)} tokens, the trainer's prompt has {len(own.token_ids)}: they"
    with pytest.raises(RunError, match=found):
        engine.generate([own], GREEDY)


def test_embedded_images_give_what_their_pixels_give(served):
    actor, engine, prompts = served
    embedded = VisionEncoder(actor.family.vision_tower(actor.model), actor.family, SETTINGS, 2).embed(prompts)
    ours, theirs = engine.generate(prompts, GREEDY), engine.generate(embedded, GREEDY)
    assert drawn(ours) == drawn(theirs) and gap(actor, theirs) < 1e-4


def test_an_update_is_served_and_vouched_for(served):
    actor, engine, prompts = served
    actor.update(answered(actor.family))
    assert gap(actor, engine.generate(prompts, Sampling(2, 8))) > 1e-3
    receipt = engine.load_weights(actor.weights(), 1)
    assert receipt.tensors == len(list(actor.weights())) and receipt.version == 1
    assert gap(actor, engine.generate(prompts, Sampling(2, 8))) < 1e-4


@pytest.mark.parametrize("place", range(3))
def test_a_tensor_that_landed_wrongly_is_named(served, kind, place, monkeypatch):
    actor, engine, _ = served
    name, reload_weights = WRONG[kind][place], engine._runner.reload_weights

    def reload_wrongly(weights_iterator):
        reload_weights(weights_iterator=((one, tensor * 1.01 if one == name else tensor) for one, tensor in weights_iterator))

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "reload_weights", reload_wrongly)
        with pytest.raises(RunError, match=f"1 different: {name}"):
            engine.load_weights(actor.weights(), 8)
    engine.load_weights(actor.weights(), 9)


def test_options_that_would_scale_images_in_the_engine_alone_are_refused(served, checkpoint, backend):
    build = registry.load("rollout_engines", "vllm")
    config = RolloutConfig(options={"mm_processor_kwargs": {"max_pixels": 9000}})
    with pytest.raises(ConfigError, match=r"rollout\.options\.mm_processor_kwargs: .*; set vision\.min_pixels and vision\.max"):
        build(served[0].family, checkpoint / "model", backend, config, torch.float32, 256, 0)
