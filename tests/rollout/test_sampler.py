import json
import re

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlcore import registry
from rlcore.config.sections import RolloutConfig
from rlcore.errors import ConfigError, RunError
from rlcore.rollout import sampler as torch_sampler
from rlcore.runtime.memory import PhaseError
from rlcore.types import Batch, Group, Row, Sample, Sampling

QUESTIONS = ["How many circles?", "What is 4 + 5? Answer with a single number inside the tags."]


def row(text, *images):
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return Row(text, [{"role": "user", "content": parts}], images=images)


def picture(color, size=112):
    image = Image.new("RGB", (size, 112), "white")
    image.paste(color, (10, 20, 60, 90))
    return image


def start(backend, folder, kind, dtype=torch.float32, **options):
    family = registry.load("families", kind)(folder)
    config = RolloutConfig(engine="torch", options=options)
    return family, torch_sampler.build(family, folder, backend, config, dtype, 256, 0)


@pytest.fixture(scope="module")
def text(models, backend):
    registry.load("models", "tiny_llama")(models / "rollout_llama", seed=0)
    return models / "rollout_llama", *start(backend, models / "rollout_llama", "llama")


@pytest.fixture(scope="module")
def vision(models, backend):
    registry.load("models", "tiny_qwen2_5_vl")(models / "rollout_vl", seed=0)
    return models / "rollout_vl", *start(backend, models / "rollout_vl", "qwen2_5_vl")


def tokens(groups):
    return [sample.token_ids.tolist() for group in groups for sample in group.samples]


def gap(model, group, temperature=1.0):
    """Largest difference between sampled log-probabilities and those of one full forward pass of `model`."""
    prompt, worst = group.prompt, 0.0
    for sample in group.samples:
        ids = torch.tensor([[*prompt.token_ids, *sample.token_ids]])
        extra = dict(prompt.vision or {})
        if prompt.position_ids is not None:
            after = torch.arange(len(sample.token_ids)) + prompt.next_position
            extra["position_ids"] = torch.cat([prompt.position_ids, after.expand(3, -1)], 1)[:, None]
        with torch.no_grad():
            logits = model(input_ids=ids, **extra).logits[0, len(prompt.token_ids) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(sample.token_ids.tolist())[:, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(sample.logprobs)).abs().max().item())
    return worst


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_whole_forward_pass(text, temperature):
    folder, family, sampler = text
    model = AutoModelForCausalLM.from_pretrained(folder)
    for group in sampler.generate([family.encode(row(q)) for q in QUESTIONS], Sampling(3, 12, temperature)):
        assert len(group.samples) == 3
        assert gap(model, group, temperature) < 1e-4


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_images_and_text_are_sampled_alike(models, backend, kind):
    folder = models / f"rollout_{kind}"
    registry.load("models", f"tiny_{kind}")(folder, layers=3, vision_layers=3)
    family, sampler = start(backend, folder, kind)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    rows = [row(QUESTIONS[0], picture("red")), row(QUESTIONS[1]), row("Which?", picture("blue", 168), picture("green"))]
    for group in sampler.generate([family.encode(one) for one in rows], Sampling(2, 8)):
        assert gap(model, group) < 1e-4


def test_prompts_of_one_length_are_continued_together_as_if_alone(vision):
    _, family, sampler = vision
    wide = picture("red", 224)
    rows = [row("How many?", wide), row("How many?"), row("How many?", wide.rotate(90, expand=True))]
    prompts = [family.encode(one) for one in rows]
    assert len(prompts[0].token_ids) == len(prompts[2].token_ids) != len(prompts[1].token_ids)
    assert prompts[0].next_position == prompts[2].next_position != len(prompts[0].token_ids)
    for temperature in (0.0, 1.0):
        together = sampler.generate(prompts, Sampling(3, 8, temperature))
        assert [group.prompt for group in together] == prompts
        assert tokens(together[:1]) == tokens(sampler.generate(prompts[:1], Sampling(3, 8, temperature)))
    alone = [group for prompt in prompts for group in sampler.generate([prompt], Sampling(3, 8, 0.0))]
    assert tokens(sampler.generate(prompts, Sampling(3, 8, 0.0))) == tokens(alone)


def test_a_seed_repeats_a_call_whatever_came_before(text):
    _, family, sampler = text
    prompts = [family.encode(row(q)) for q in QUESTIONS]
    first = tokens(sampler.generate(prompts, Sampling(4, 8, seed=5)))
    before = torch.get_rng_state()
    assert tokens(sampler.generate(prompts, Sampling(4, 8, seed=6))) != first
    assert tokens(sampler.generate(prompts, Sampling(4, 8, seed=5))) == first
    assert torch.equal(before, torch.get_rng_state())


def test_every_bit_of_a_seed_counts():
    """torch's CPU generator reads only 32 of them."""
    assert all(torch_sampler._seed(1 << bit, 0) != torch_sampler._seed(0, 0) for bit in range(63))
    assert len({torch_sampler.folded(5 + (number << 40)) for number in range(100)}) == 100


def test_two_rows_of_one_prompt_draw_differently(text):
    _, family, sampler = text
    prompt = family.encode(row(QUESTIONS[0]))
    one, other = sampler.generate([prompt, prompt], Sampling(4, 8, seed=5))
    assert tokens([one]) != tokens([other])
    assert tokens(sampler.generate([prompt], Sampling(4, 8, seed=5, first=1))) == tokens([other]), "wherever it is drawn"


def test_a_sample_without_all_its_logprobs_is_refused(text):
    _, family, _ = text
    group = Group(family.encode(row("go")), [Sample([9, 10], [-1.0], "", "stop", 0)])
    with pytest.raises(RunError, match="go: the engine gave 1 log-probabilities for 2 tokens"):
        Batch.of([group])


def test_samples_end_with_the_stop_token_or_at_the_limit(text):
    _, family, sampler = text
    samples = sampler.generate([family.encode(row("go"))], Sampling(96, 64))[0].samples
    assert {sample.finish for sample in samples} == {"stop", "length"}
    for sample in samples:
        stops = [token in family.stop_token_ids for token in sample.token_ids]
        assert not any(stops[:-1])
        assert stops[-1] == (sample.finish == "stop")
        assert len(sample.token_ids) == len(sample.logprobs)
        assert sample.finish == "stop" or len(sample.token_ids) == 64


def test_temperature_0_is_greedy(text):
    folder, family, sampler = text
    prompt = family.encode(row("How many?"))
    samples = sampler.generate([prompt], Sampling(2, 6, temperature=0))[0].samples
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt.token_ids, *samples[0].token_ids]])).logits[0, len(prompt.token_ids) - 1 : -1]
    assert samples[0].token_ids.tolist() == samples[1].token_ids.tolist() == logits.argmax(-1).tolist()


def test_top_k_and_top_p_leave_out_the_unlikely():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, -1)
    for sampling, kept in [(Sampling(1, 1, top_k=2), 2), (Sampling(1, 1, top_p=0.7), 2), (Sampling(1, 1, top_p=0.9), 3)]:
        drawn, logprobs = torch_sampler.draw(logits, sampling, [torch.Generator().manual_seed(0)])
        assert set(drawn.tolist()) == set(range(kept))
        share = logits[0].exp() / logits[0, :kept].exp().sum()
        torch.testing.assert_close(logprobs.exp(), share[drawn])


def test_new_weights_are_served_and_stamped(backend, text):
    folder, family, _ = text
    _, sampler = start(backend, folder, "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    prompt = family.encode(row("How many?"))
    assert gap(model, sampler.generate([prompt], Sampling(2, 8))[0]) > 1e-2
    receipt = sampler.load_weights(model.named_parameters(), 7)
    assert (receipt.version, receipt.tensors) == (7, len(list(model.parameters())))
    group = sampler.generate([prompt], Sampling(2, 8))[0]
    assert gap(model, group) < 1e-4
    assert {sample.policy_version for sample in group.samples} == {7}
    assert sampler.load_weights(model.state_dict().items(), 8).tensors == len(model.state_dict())


@pytest.mark.parametrize("fault", ["dropped", "unknown", "misshapen"])
def test_a_faulty_update_names_the_tensor(backend, text, fault):
    folder, _, _ = text
    _, sampler = start(backend, folder, "llama")
    weights = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    name = "model.layers.1.self_attn.k_proj.weight"
    tensor = weights.pop(name)
    if fault == "unknown":
        weights |= {name: tensor, "model.layers.9.bias": torch.zeros(3)}
        name = "model.layers.9.bias"
    if fault == "misshapen":
        weights[name] = tensor[1:]
    with pytest.raises(RunError, match=name.replace(".", r"\.")):
        sampler.load_weights(weights.items(), 1)


def weights_of(folder, family, step, dtype=torch.float32):
    """The weights of a policy after `step` updates."""
    kind = AutoModelForImageTextToText if "vl" in folder.name else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(step * 0.01)
    return [(family.hf_name(name), parameter) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen2_5_vl"])
def test_updates_sleeps_and_samples_leave_the_rest_of_a_model_as_it_was(backend, text, vision, kind, dtype):
    folder = (text if kind == "llama" else vision)[0]
    family, sampler = start(backend, folder, kind, dtype)
    prompts = [family.encode(row("How many?", *([picture("red")] if kind == "qwen2_5_vl" else [])))]
    assert len(sampler._constants._loaded) >= 2
    for version in (1, 2, 3):
        sampler.load_weights(weights_of(folder, family, version, dtype), version)
        sampler.generate(prompts, Sampling(1, 4))
        sampler.pause()
        sampler.resume()
        sampler.generate(prompts, Sampling(1, 4))


BUFFERS = {"llama": ["model.rotary_emb.inv_freq"]}
BUFFERS["qwen2_5_vl"] = ["model.visual.rotary_pos_emb.inv_freq", "model.language_model.rotary_emb.inv_freq"]


@pytest.mark.parametrize("event", ["the update to version 1", "waking the engine"])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in BUFFERS.items() for name in names])
def test_a_buffer_that_does_not_stay_as_it_was_is_named(backend, text, vision, kind, name, event):
    folder = (text if kind == "llama" else vision)[0]
    family, sampler = start(backend, folder, kind)
    buffer = sampler._model.get_buffer(name)

    def spoiling(weights):
        yield from weights
        buffer.mul_(1.001)

    with pytest.raises(RunError, match=rf"{event} left the engine without .* 1 different: {re.escape(name)};"):
        if event == "waking the engine":
            sampler.pause()
            buffer.zero_()
            sampler.resume()
        else:
            sampler.load_weights(spoiling(weights_of(folder, family, 1)), 1)
    with pytest.raises(PhaseError):
        sampler.generate([family.encode(row("How many?"))], Sampling(1, 2))


def test_positions_that_grow_with_what_was_read_are_no_fault(models, backend):
    folder = models / "rollout_dynamic_llama"
    registry.load("models", "tiny_llama")(folder, seed=0)
    settings = json.loads((folder / "config.json").read_text())
    settings["rope_parameters"] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    settings["max_position_embeddings"] = 16
    (folder / "config.json").write_text(json.dumps(settings))
    family, sampler = start(backend, folder, "llama")
    before = sampler._model.model.rotary_emb.inv_freq.clone()
    sampler.generate([family.encode(row("How many circles are there in this picture?"))], Sampling(1, 40))
    assert not torch.equal(before, sampler._model.model.rotary_emb.inv_freq)
    sampler.load_weights(weights_of(folder, family, 1), 1)


def test_after_an_update_that_failed_nothing_is_sampled(backend, text):
    folder, family, _ = text
    _, sampler = start(backend, folder, "llama")
    with pytest.raises(RunError, match="missing"):
        sampler.load_weights(weights_of(folder, family, 1)[:-1], 1)
    assert sampler.version is None
    with pytest.raises(PhaseError, match="whose last update failed; send it weights first"):
        sampler.generate([family.encode(row("How many?"))], Sampling(1, 2))
    sampler.load_weights(weights_of(folder, family, 1), 1)
    assert sampler.generate([family.encode(row("How many?"))], Sampling(1, 2))[0].samples[0].policy_version == 1


def test_unknown_options_are_named(backend, text):
    with pytest.raises(ConfigError, match=r"rollout\.options\.max_num_seqs: no such setting"):
        start(backend, text[0], "llama", max_num_seqs=4)
