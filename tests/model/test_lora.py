"""LoRA: zero at first, the only trained weights, merged for the engine; the reference is the model without LoRA."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from saving import save

from rlcore import registry
from rlcore.algorithms import aggregation
from rlcore.algorithms.objective import Objective, tokens
from rlcore.algorithms.schedule import MinibatchSchedule
from rlcore.algorithms.sft import negative_log_likelihood
from rlcore.config.sections import LoraConfig, OptimizerConfig, RolloutConfig
from rlcore.errors import ConfigError
from rlcore.model import lora
from rlcore.model.actor import LoraOffReference, TorchActor
from rlcore.model.forward import ForwardSettings
from rlcore.model.loaded import LoadedModel
from rlcore.model.reference import TorchReference
from rlcore.rollout import sampler as torch_sampler
from rlcore.types import Batch, Group, Row, Sample, Sampling

SETTINGS = ForwardSettings(torch.device("cpu"), torch.float32, 256, 1.0)


every_kind = pytest.mark.parametrize("kind", ["llama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"], indirect=True, scope="module")


@pytest.fixture(autouse=True)
def _one_thread(backend):
    torch.set_num_threads(1)
    yield
    backend.prepare()


@pytest.fixture(scope="module")
def kind(request):
    """The model's family."""
    return getattr(request, "param", "llama")


@pytest.fixture(scope="module")
def folder(tiny_llama, models, kind):
    if kind == "llama":
        return tiny_llama
    if not (models / f"lora_{kind}").exists():
        registry.load("models", f"tiny_{kind}")(models / f"lora_{kind}", hidden_size=64, layers=2, vision_layers=2)
    return models / f"lora_{kind}"


@pytest.fixture(scope="module")
def family(folder, kind):
    return registry.load("families", kind)(folder)


@pytest.fixture(scope="module")
def batch(family, kind):
    images = [] if kind == "llama" else [Image.new("RGB", (96, 64), "red")]
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": "3 + 4?"}]
    prompt = family.encode(Row("a", [{"role": "user", "content": parts}], images=images))
    return Batch.of([Group(prompt, [Sample(ids, [0.0] * len(ids), "", "stop", 0) for ids in ([9, 10, 11], [20, 30])])])


def plain(family, folder):
    return family.load(folder, torch.float32)


def with_lora(family, folder, **settings):
    model = plain(family, folder)
    return lora.attach(model, LoraConfig(**settings), family.head(model))


def actor_of(model, family):
    objective = Objective(negative_log_likelihood, aggregation.token_mean, tokens)
    return TorchActor(
        LoadedModel(model, family), SETTINGS, objective, OptimizerConfig(lr=0.05), MinibatchSchedule(total_steps=3)
    )


@pytest.fixture
def trained(family, folder, batch):
    actor = actor_of(with_lora(family, folder, rank=4), family)
    for _ in range(3):
        actor.update(batch)
    return actor


def test_they_change_nothing_until_they_learn(family, folder, batch):
    before = TorchReference(LoadedModel(plain(family, folder), family), SETTINGS).logprobs(batch)
    assert torch.equal(actor_of(with_lora(family, folder), family).logprobs(batch), before)


@every_kind
def test_only_they_learn_and_the_reference_stays_the_model_without_them(trained, family, folder, batch):
    fresh = plain(family, folder)
    before = TorchReference(LoadedModel(fresh, family), SETTINGS).logprobs(batch)
    assert (trained.logprobs(batch) - before).abs().max() > 0.1
    assert torch.equal(LoraOffReference(trained).logprobs(batch), before)
    assert (trained.logprobs(batch) - before).abs().max() > 0.1, "switched on again"
    learning = {name for name, parameter in trained.model.named_parameters() if parameter.requires_grad}
    assert learning and all(".lora_" in name for name in learning)
    named = trained.model.named_parameters()
    base = {name.replace(".base_layer", ""): weight for name, weight in named if ".lora_" not in name}
    assert all(torch.equal(base[name], weight) for name, weight in fresh.named_parameters())


@every_kind
def test_the_engine_and_the_saved_folder_hold_the_sum(trained, family, folder, batch, backend, tmp_path):
    engine = torch_sampler.build(family, folder, backend, RolloutConfig(), torch.float32, 64, 0)
    engine.load_weights(trained.weights(), 1)
    prompt = batch.groups[0].prompt
    drawn = Batch.of(engine.generate([prompt], Sampling(4, 6)))
    assert torch.allclose(trained.logprobs(drawn), drawn.rollout_logprobs, atol=1e-5)
    save(trained, tmp_path)
    saved = family.model_class.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert not any(".lora_" in name or "base_layer" in name for name, _ in saved.named_parameters())
    loaded = TorchReference(LoadedModel(family.load(tmp_path / "model", torch.float32), family), SETTINGS)
    assert torch.allclose(loaded.logprobs(batch), trained.logprobs(batch), atol=1e-5)


def test_a_checkpoint_brings_them_and_their_moments_back(trained, family, folder, batch, tmp_path):
    save(trained, tmp_path)
    again = actor_of(with_lora(family, folder, rank=4), family)
    again.load(tmp_path)
    assert torch.equal(again.logprobs(batch), trained.logprobs(batch))
    assert again.update(batch) == trained.update(batch)
    assert torch.equal(again.logprobs(batch), trained.logprobs(batch))


def test_targets_choose_layers_by_the_end_of_their_name(family, folder):
    model = with_lora(family, folder, targets=["q_proj", "layers.1.mlp.up_proj"])
    wrapped = {name for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert wrapped == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}


def test_the_head_and_frozen_layers_have_none(family, folder):
    model = plain(family, folder)
    model = lora.attach(model, LoraConfig(), family.head(model), frozen={"model.layers.0.mlp.up_proj"})
    wrapped = {name for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert "lm_head" not in wrapped and "model.layers.0.mlp.up_proj" not in wrapped and "model.layers.1.mlp.up_proj" in wrapped


def test_a_target_that_is_not_there_lists_what_is(family, folder):
    with pytest.raises(ConfigError, match=r"model.lora.targets: .*\['qproj'\]; the model has .*q_proj"):
        with_lora(family, folder, targets=["qproj"])
