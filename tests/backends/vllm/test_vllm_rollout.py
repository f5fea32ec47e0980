import gc
import importlib.util
import re
import weakref

import pytest
import torch
from PIL import Image
from rlcore_backends.vllm.internals import derives_from_weights
from rlcore_backends.vllm.manifest import WeightManifest, _product
from torch import nn
from transformers import AutoModelForImageTextToText

from rlcore import registry
from rlcore.config.sections import RolloutConfig
from rlcore.errors import ConfigError, PluginError, RunError
from rlcore.model.forward import ForwardSettings
from rlcore.model.vision import VisionEncoder
from rlcore.runtime.memory import PhaseError
from rlcore.types import Group, Row, Sampling

vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
QUESTIONS = ["How many circles?", "What is 4 + 5? Answer with a single number inside the tags."]


def row(text, *images):
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return Row(text, [{"role": "user", "content": parts}], images=images)


def picture(color, size=112):
    image = Image.new("RGB", (size, 112), "white")
    image.paste(color, (10, 20, 60, 90))
    return image


def start(backend, folder, engine="vllm", **options):
    family = registry.load("families", "qwen2_5_vl")(folder)
    config = RolloutConfig(engine=engine, options=options)
    return registry.load("rollout_engines", engine)(family, folder, backend, config, torch.float32, 256, 0, image_embeds=True)


@pytest.fixture(scope="module")
def folder(models):
    registry.load("models", "tiny_qwen2_5_vl")(models / "vllm_vl", seed=0)
    return models / "vllm_vl"


@pytest.fixture(scope="module")
def engine(folder, backend):
    return start(backend, folder)


@pytest.fixture
def model(folder, engine):
    """A model with the weights that the engine serves."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    engine.load_weights(model.named_parameters(), 0)
    return model


@pytest.fixture(scope="module")
def prompts(folder):
    family = registry.load("families", "qwen2_5_vl")(folder)
    rows = [row(QUESTIONS[0], picture("red")), row(QUESTIONS[1]), row("Which?", picture("blue", 168), picture("green"))]
    return [family.encode(one) for one in rows]


def shake(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def tokens(groups):
    return [sample.token_ids.tolist() for group in groups for sample in group.samples]


def gap(model, groups, temperature=1.0):
    """Largest difference between engine log-probs and those of `model`, run on the prompt, then on the whole response."""
    worst = 0.0
    for prompt, sample in ((group.prompt, sample) for group in groups for sample in group.samples):
        first, after = dict(prompt.vision or {}), {}
        if prompt.position_ids is not None:
            first["position_ids"] = prompt.position_ids[:, None]
            positions = torch.arange(len(sample.token_ids) - 1) + prompt.next_position
            after["position_ids"] = positions.expand(3, -1)[:, None]
        with torch.no_grad():
            read = model(input_ids=torch.tensor([prompt.token_ids]), use_cache=True, **first)
            response = torch.tensor([sample.token_ids[:-1].tolist()])
            rest = model(input_ids=response, past_key_values=read.past_key_values, **after).logits if response.numel() else None
        logits = torch.cat([read.logits[0, -1:], *([] if rest is None else [rest[0]])])
        expected = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(sample.token_ids.tolist())[:, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(sample.logprobs)).abs().max().item())
    return worst


@vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_models_own_for_text_and_images(engine, model, prompts, temperature):
    groups = engine.generate(prompts, Sampling(3, 12, temperature))
    assert [group.prompt for group in groups] == prompts
    assert [len(group.samples) for group in groups] == [3, 3, 3]
    assert gap(model, groups, temperature) < 1e-4


@vllm
def test_a_stream_that_fails_leaves_nothing_for_the_next(engine, model, prompts, monkeypatch):
    def dies():
        raise OSError("the pipe is gone")

    whole = tokens(engine.generate(prompts, Sampling(2, 8)))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_beat", dies)
        with pytest.raises(OSError, match="the pipe is gone"):
            engine.generate(prompts, Sampling(2, 8))
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert tokens(engine.generate(prompts, Sampling(2, 8))) == whole


@vllm
def test_an_earlier_engine_is_gone_before_the_next_begins(folder, backend, monkeypatch, request):
    """Garbage collection of a vLLM engine tears down its process groups."""

    class Earlier:
        def __init__(self):
            self.itself = self

    request.addfinalizer(gc.enable)
    gc.disable()
    gone = weakref.ref(Earlier())

    def begin(**arguments):
        assert gone() is None
        raise ValueError("enough")

    monkeypatch.setattr("vllm.LLM", begin)
    with pytest.raises(ConfigError, match="enough"):
        start(backend, folder)


@vllm
def test_an_update_is_served_at_once(engine, model, prompts):
    for version in (1, 2):
        shake(model)
        assert gap(model, engine.generate(prompts, Sampling(2, 8))) > 1e-3
        receipt = engine.load_weights(model.named_parameters(), version)
        groups = engine.generate(prompts, Sampling(2, 8))
        assert gap(model, groups) < 1e-4
        assert {sample.policy_version for group in groups for sample in group.samples} == {receipt.version} == {version}
    assert receipt.tensors == len(list(model.parameters()))
    assert receipt.bytes == sum(parameter.nbytes for parameter in model.parameters())


@vllm
def test_a_seed_repeats_a_call_and_leaves_other_draws_alone(engine, model, prompts):
    first = tokens(engine.generate(prompts, Sampling(4, 8, seed=5)))
    before = torch.get_rng_state()
    assert tokens(engine.generate(prompts, Sampling(4, 8, seed=6))) != first
    assert tokens(engine.generate(prompts, Sampling(4, 8, seed=5))) == first
    assert torch.equal(before, torch.get_rng_state())


@vllm
def test_engines_that_share_a_call_draw_differently(engine, prompts):
    """Each engine gets the index of its first prompt."""
    drawn = [tokens(engine.generate(prompts[:1], Sampling(4, 8, seed=5, first=first))) for first in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]


@vllm
def test_greedy_tokens_are_the_plain_samplers(engine, model, prompts, folder, backend):
    sampling = Sampling(1, 12, temperature=0)
    plain = start(backend, folder, "torch")
    assert tokens(engine.generate(prompts, sampling)) == tokens(plain.generate(prompts, sampling))


def read_by(model, folder, prompts):
    """The prompts with their images encoded by the tower of `model`, two at a time."""
    family = registry.load("families", "qwen2_5_vl")(folder)
    settings = ForwardSettings(torch.device("cpu"), torch.float32, 256, 1.0)
    return VisionEncoder(family.vision_tower(model), family, settings, 2).embed(prompts)


@vllm
def test_images_that_have_been_read_are_not_read_again_and_give_the_same(engine, model, prompts, folder):
    read = []
    with engine._runner.get_model().visual.register_forward_hook(lambda *_: read.append(1)):
        embedded = engine.generate(read_by(model, folder, prompts), Sampling(1, 12, temperature=0))
        assert not read
        pixels = engine.generate(prompts, Sampling(1, 12, temperature=0))
        assert read
    assert tokens(embedded) == tokens(pixels)
    for one, other in zip(embedded, pixels, strict=True):
        assert one.samples[0].logprobs == pytest.approx(other.samples[0].logprobs, abs=1e-5)


@vllm
def test_images_are_taken_as_another_tower_read_them(engine, model, prompts, folder):
    shake(model.model.visual)
    drawn = engine.generate(read_by(model, folder, prompts), Sampling(2, 8))
    assert gap(model, [Group(prompt, group.samples) for prompt, group in zip(prompts, drawn, strict=True)]) < 1e-4
    assert gap(model, engine.generate(prompts, Sampling(2, 8))) > 1e-3, "the engine's own tower is as it was"


@vllm
def test_samples_end_with_the_stop_token_or_at_the_limit(engine, model, prompts, folder):
    stops = registry.load("families", "qwen2_5_vl")(folder).stop_token_ids
    samples = engine.generate(prompts[1:2], Sampling(96, 64))[0].samples
    assert {sample.finish for sample in samples} == {"stop", "length"}
    for sample in samples:
        assert [token in stops for token in sample.token_ids[:-1]].count(True) == 0
        assert (sample.token_ids[-1] in stops) == (sample.finish == "stop")


def _drop(weights, name, other):
    del weights[name]


def _misshapen(weights, name, other):
    weights[name] = weights[name][:-1]


NAMES = {
    "packed": "model.language_model.layers.1.self_attn.k_proj.weight",
    "bias": "model.language_model.layers.1.self_attn.k_proj.bias",
    "whole": "model.language_model.layers.2.self_attn.o_proj.weight",
    "norm": "model.language_model.layers.2.input_layernorm.weight",
    "vision": "model.visual.blocks.1.mlp.up_proj.weight",
    "embedding": "model.language_model.embed_tokens.weight",
}


LEAVES = ["self_attn.k_proj.weight", "self_attn.k_proj.bias", "mlp.down_proj.weight", "input_layernorm.weight"]


@vllm
@pytest.mark.parametrize("fault", [_drop, _misshapen])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_faulty_stream_names_the_tensor(engine, model, name, fault):
    weights = dict(model.named_parameters())
    fault(weights, name, None)
    with pytest.raises(RunError, match=".".join(name.split(".")[-2:])):
        engine.load_weights(weights.items(), 1)


@vllm
def test_an_unknown_tensor_is_named(engine, model):
    weights = dict(model.named_parameters()) | {"model.language_model.layers.1.surplus": torch.zeros(4)}
    with pytest.raises(RunError, match="surplus"):
        engine.load_weights(weights.items(), 1)


@vllm
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("fault", ["swapped", "stale"])
def test_tensors_that_landed_wrongly_are_named(engine, model, monkeypatch, leaf, fault):
    """The engine receives other values than the check recorded."""
    names = [f"model.language_model.layers.{layer}.{leaf}" for layer in (1, 2)]
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    shake(model)
    new = dict(model.named_parameters())
    wrong = {names[0]: new[names[1]], names[1]: new[names[0]]} if fault == "swapped" else {names[0]: old[names[0]]}
    reload_weights = engine._runner.reload_weights

    def reload_wrongly(weights_iterator):
        reload_weights(weights_iterator=((name, wrong.get(name, tensor)) for name, tensor in weights_iterator))

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "reload_weights", reload_wrongly)
        with pytest.raises(RunError, match=rf"{len(wrong)} different: {names[0]}"):
            engine.load_weights(model.named_parameters(), 1)
    engine.load_weights(model.named_parameters(), 2)


@vllm
def test_a_tied_head_that_stays_behind_is_named(engine, model, monkeypatch):
    shake(model)
    with monkeypatch.context() as patch:
        patch.setattr(engine._manifest, "serve_tied_heads", lambda: None)
        with pytest.raises(RunError, match=r"different: language_model\.lm_head \(as served\)"):
            engine.load_weights(model.named_parameters(), 1)
    engine.load_weights(model.state_dict().items(), 2)


CONSTANTS = {
    "positions": "language_model.model.layers.0.self_attn.rotary_emb.cos_sin_cache",
    "vision": "visual.rotary_pos_emb.cos_sin_cache",
    "scale": "language_model.model.layers.1.self_attn.attn._q_scale",
    "attribute": "language_model.model.layers.1.self_attn.attn._k_scale_cpu",
}


@vllm
@pytest.mark.parametrize("fault", [0.0, 1.01])
@pytest.mark.parametrize("name", CONSTANTS.values(), ids=CONSTANTS)
def test_what_a_reload_writes_over_without_having_been_sent_it_is_named(engine, model, monkeypatch, prompts, name, fault):
    """As in vLLM #44371."""
    layer, _, leaf = name.rpartition(".")
    layer = engine._runner.get_model().get_submodule(layer)
    kept, reload_weights = getattr(layer, leaf).clone(), engine._runner.reload_weights

    def reload_wrongly(weights_iterator):
        reload_weights(weights_iterator=weights_iterator)
        getattr(layer, leaf).mul_(fault)

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "reload_weights", reload_wrongly)
        words = rf"the update to version 1 left the engine without .* 1 different: {re.escape(name)}; .*rollout\.engine=torch"
        with pytest.raises(RunError, match=words):
            engine.load_weights(model.named_parameters(), 1)
    with pytest.raises(PhaseError, match="whose last update failed"):
        engine.generate(prompts, Sampling(1, 2))
    if leaf == "cos_sin_cache":  # every update rewrites scales
        with pytest.raises(RunError, match=f"the update to version 2 .* 1 different: {re.escape(name)};"):
            engine.load_weights(model.named_parameters(), 2)
        getattr(layer, leaf).copy_(kept)
    engine.load_weights(model.named_parameters(), 2)


@vllm
def test_a_weight_that_is_served_in_wider_numbers_is_what_was_sent(engine, model, monkeypatch):
    """As biases of a bfloat16 model on a CPU with AMX."""
    name, manifest = NAMES["norm"], engine._manifest
    parameter = manifest.parameter(manifest.slot(name).layer, "weight")
    parameter.data = parameter.data.double()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_manifest", WeightManifest(engine._runner.get_model(), manifest.dtype, {}))
        engine.load_weights(model.named_parameters(), 1)
        assert parameter.dtype == torch.float64
        reload_weights = engine._runner.reload_weights

        def reload_wrongly(weights_iterator):
            reload_weights(weights_iterator=weights_iterator)
            parameter.data[0] += 1e-12

        patch.setattr(engine._runner, "reload_weights", reload_wrongly)
        with pytest.raises(RunError, match=rf"1 different: {re.escape(name)};"):
            engine.load_weights(model.named_parameters(), 2)
    parameter.data = parameter.data.float()
    engine.load_weights(model.named_parameters(), 2)


def test_a_packed_matrix_is_told_from_one_that_differs_anywhere():
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    for column in range(8):
        changed, nearly = weight.clone(), weight.clone()
        changed[3, column] += 0.01
        nearly[3, column] = torch.nextafter(nearly[3, column], torch.tensor(9.0))
        for version in range(16):
            sent = _product(weight, version)
            assert sent == _product(weight.clone(), version) != _product(changed, version)
            assert (sent == _product(nearly, version)) == (version % 8 != column), "to rounding, and one column to the bit"


class Rearranged(nn.Module):
    """A layer that derives tensors from other layers' weights, as attention with a compressed cache (MLA) does."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def process_weights_after_loading(self, dtype):
        pass


@vllm
def test_which_layers_may_make_tensors_of_weights(engine):
    layers = dict(engine._runner.get_model().named_modules())
    attention = layers["language_model.model.layers.0.self_attn.attn"]
    assert hasattr(attention, "process_weights_after_loading") and not derives_from_weights(attention)
    assert not derives_from_weights(Rearranged())
    assert derives_from_weights(Rearranged(nn.Linear(2, 2))) and not derives_from_weights(nn.ModuleList([nn.Linear(2, 2)]))
    assert derives_from_weights(layers["language_model.model.layers.0.self_attn.qkv_proj"])
    assert not derives_from_weights(layers["visual"])
    assert not derives_from_weights(layers["language_model.model.layers.0.self_attn.rotary_emb"])


@vllm
def test_heads_without_a_kernel_are_refused_before_the_first_sample(tmp_path, backend):
    registry.load("models", "tiny_qwen2_5_vl")(tmp_path, hidden_size=64, layers=1, heads=4)
    with pytest.raises(ConfigError, match=r"CPU_ATTN has no kernel for .* heads of 16 \(it has 32, .*rollout.engine=torch"):
        start(backend, tmp_path)


@vllm
def test_unknown_options_are_named(folder, backend):
    with pytest.raises(ConfigError, match=r"rollout\.options\.max_num_seq: .*did you mean 'max_num_seqs'"):
        start(backend, folder, max_num_seq=4)


def test_a_missing_vllm_says_how_to_install_it(folder, backend, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    build = registry.load("rollout_engines", "vllm")
    with pytest.raises(PluginError, match=r"pip install -r requirements/cpu\.txt or set rollout\.engine=torch"):
        build(None, folder, backend, RolloutConfig(), torch.float32, 256, 0)
