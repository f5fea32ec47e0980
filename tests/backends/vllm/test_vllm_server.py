"""A real vLLM server: what it draws, what it holds after an update, a run that learns through it, and its death.

One server for the whole file, of a small vision-language model; the last test kills it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from PIL import Image
from rlcore_backends.server.rollout import seed_of
from transformers import AutoModelForImageTextToText

from rlcore import registry
from rlcore.config.sections import RolloutConfig
from rlcore.errors import ConfigError, RunError
from rlcore.model.forward import ForwardSettings
from rlcore.model.vision import VisionEncoder
from rlcore.runtime.memory import PhaseError
from rlcore.types import Row, Sampling

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
LONGEST = 96
STEPS = 8
SAMPLING = Sampling(samples=3, max_new_tokens=12, seed=3)


def build(backend, folder, engine="vllm_server", dtype=torch.float32, longest=LONGEST, embeds=False, **options):
    family = registry.load("families", "qwen2_5_vl")(folder)
    config = RolloutConfig(engine=engine, options=options)
    return registry.load("rollout_engines", engine)(
        family, folder, backend, config, dtype, longest, 0, image_embeds=embeds
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(models):
    registry.load("models", "tiny_qwen2_5_vl")(models / "served", layers=2, vision_layers=2)
    return models / "served"


@pytest.fixture(scope="module")
def served(backend, folder):
    """A server that we start, and the rollout over it."""
    small = type(backend)(backend.options.model_copy(update={"kv_cache_gib": 0.25}))
    return build(small, folder, embeds=True, arguments={"max_num_seqs": 16, "block_size": 32})


@pytest.fixture(scope="module")
def address(served):
    return served._fleet.servers[0].address


@pytest.fixture(scope="module")
def engine(address, backend, folder):
    """The same server at its address, with whole images."""
    return build(backend, folder, addresses=[address])


@pytest.fixture
def model(folder, engine):
    """A model whose weights the server serves."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    engine.load_weights(model.named_parameters(), 1)
    return model


@pytest.fixture(scope="module")
def family(folder):
    return registry.load("families", "qwen2_5_vl")(folder)


def row(text, *images):
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return Row(text, [{"role": "user", "content": parts}], images=images)


def picture(color, size=112):
    image = Image.new("RGB", (size, 112), "white")
    image.paste(color, (10, 20, 60, 90))
    return image


@pytest.fixture(scope="module")
def prompts(family):
    rows = [row("How many?", picture("red")), row("What is 4 + 5?"), row("Which?", picture("blue", 168), picture("green"))]
    return [family.encode(one) for one in rows]


@pytest.fixture(scope="module")
def embedded(folder, family, prompts):
    tower = AutoModelForImageTextToText.from_pretrained(folder).model.visual
    encoder = VisionEncoder(tower, family, ForwardSettings(torch.device("cpu"), torch.float32, 4096, 1.0), 16)
    return [prompt.for_models() for prompt in encoder.embed(prompts)]


@torch.no_grad()
def shake(model):
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def tokens(groups):
    return [sample.token_ids.tolist() for group in groups for sample in group.samples]


@torch.no_grad()
def gap(model, groups):
    """Largest difference between the server's log-probabilities and those of `model`."""
    worst = 0.0
    for prompt, sample in ((group.prompt, sample) for group in groups for sample in group.samples):
        ids = torch.tensor([prompt.token_ids + sample.token_ids.tolist()])
        first = dict(prompt.vision or {})
        if prompt.position_ids is not None:
            after = torch.arange(len(sample.token_ids)) + prompt.next_position
            first["position_ids"] = torch.cat([prompt.position_ids, after.expand(3, -1)], dim=1)[:, None]
        logits = model(input_ids=ids, **first).logits[0, len(prompt.token_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, ids[0, len(prompt.token_ids) :, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(sample.logprobs)).abs().max().item())
    return worst


def test_logprobs_are_the_models_own_for_text_and_images(engine, model, prompts):
    groups = engine.generate(prompts, SAMPLING)
    assert [len(group.samples) for group in groups] == [3, 3, 3] and len(set(map(tuple, tokens(groups)))) == 9
    assert gap(model, groups) < 1e-4


def test_embedded_images_are_the_images(served, engine, model, prompts, embedded):
    served.version = engine.version
    whole, read = engine.generate(prompts, SAMPLING), served.generate(embedded, SAMPLING)
    assert tokens(read) == tokens(whole)
    for group, other in zip(whole, read, strict=True):
        for sample, same in zip(group.samples, other.samples, strict=True):
            assert abs(sample.logprobs - same.logprobs).max() < 1e-5


def test_greedy_samples_are_those_of_the_plain_sampler(engine, model, prompts, backend, folder):
    plain = build(backend, folder, "torch")
    greedy = Sampling(samples=1, max_new_tokens=8, temperature=0)
    theirs, ours = plain.generate(prompts, greedy), engine.generate(prompts, greedy)
    assert tokens(theirs) == tokens(ours)
    for group, other in zip(theirs, ours, strict=True):
        assert abs(group.samples[0].logprobs - other.samples[0].logprobs).max() < 1e-4


def test_a_seed_repeats_a_call_whatever_else_is_drawn(engine, model, prompts):
    drawn = tokens(engine.generate(prompts, SAMPLING))
    assert tokens(engine.generate(prompts, Sampling(3, 12, seed=4))) != drawn
    assert tokens(engine.generate(prompts, SAMPLING)) == drawn
    assert tokens(engine.generate(prompts[1:], Sampling(3, 12, seed=3, first=1))) == drawn[3:]


def test_an_update_is_served_at_once_and_samples_know_its_version(engine, model, prompts):
    before = engine.generate(prompts, SAMPLING)
    shake(model)
    assert gap(model, before) > 0.01
    receipt = engine.load_weights(model.named_parameters(), 7)
    parameters = dict(model.named_parameters())
    assert (receipt.version, receipt.tensors) == (7, len(parameters))
    assert receipt.bytes == sum(tensor.nbytes for tensor in parameters.values()) and receipt.check_seconds > 0
    groups = engine.generate(prompts, SAMPLING)
    assert gap(model, groups) < 1e-4 and {sample.policy_version for group in groups for sample in group.samples} == {7}


def test_an_update_by_somebody_else_is_noticed(served, engine, model, prompts):
    served.version = 1
    engine.load_weights(model.named_parameters(), 8)
    with pytest.raises(RunError, match="drawn with the weights 8, not 1"):
        served.generate(prompts[1:2], SAMPLING)


class Flipped:
    """A group in which one byte of every large message is changed on its way."""

    def __init__(self, group):
        self._group = group

    def broadcast(self, message, root):
        if len(message) > 100_000:
            message[len(message) // 2] ^= 1
        return self._group.broadcast(message, root)


FAULTS = {
    r"\w+(\.\w+)+ was changed on its way": "flipped",
    "1 missing .*q_proj": lambda named: [one for one in named if "layers.1.self_attn.q_proj.weight" not in one[0]],
    "unexpected tensor model.nothing.weight": lambda named: [*named, ("model.nothing.weight", torch.ones(4))],
    r"norm.weight was sent as \[\d+\], the engine holds \[\d+\]": lambda named: [
        (name, tensor[:-1] if name.endswith("language_model.norm.weight") else tensor) for name, tensor in named
    ],
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_does_not_arrive_is_named_with_the_server(message, engine, model, prompts, address, monkeypatch):
    before = tokens(engine.generate(prompts, SAMPLING))
    fault, named = FAULTS[message], [(name, tensor.detach()) for name, tensor in model.named_parameters()]
    with monkeypatch.context() as patch, pytest.raises(RunError, match=f"{address}.*{message}"):
        if fault == "flipped":
            patch.setattr(engine._api._broadcast, "_group", Flipped(engine._api._broadcast._group))
        engine.load_weights(named if fault == "flipped" else fault(named), 2)
    with pytest.raises(PhaseError, match="last update failed"):
        engine.generate(prompts, SAMPLING)
    engine.load_weights(named, 3)
    assert tokens(engine.generate(prompts, SAMPLING)) == before


def test_a_pause_frees_the_cache_and_keeps_the_weights(engine, model, prompts):
    before, held = tokens(engine.generate(prompts, SAMPLING)), engine.device_bytes()
    engine.pause()
    assert engine.device_bytes() < held - 200 * 2**20
    with pytest.raises(PhaseError, match="resume it first"):
        engine.generate(prompts, SAMPLING)
    engine.resume()
    assert engine.device_bytes() == held and tokens(engine.generate(prompts, SAMPLING)) == before


def test_a_server_that_a_run_left_paused_serves_the_next_run(engine, model, prompts, address, backend, folder):
    drawn = tokens(engine.generate(prompts[1:2], SAMPLING))
    engine.pause()
    following = build(backend, folder, addresses=[address])
    following.version = engine.version
    assert tokens(following.generate(prompts[1:2], SAMPLING)) == drawn
    engine.resume()


def test_a_stream_that_is_left_leaves_nothing_running(engine, model, prompts):
    stream = engine.stream(prompts * 8, Sampling(samples=4, max_new_tokens=40))
    next(stream)
    stream.close()
    server, deadline = engine._fleet.servers[0], time.monotonic() + 20
    running = re.compile(r"^vllm:num_requests_(?:running|waiting)\S* [1-9]", re.MULTILINE)
    while running.search(engine._fleet.loop.run(server.get("/metrics"))):
        assert time.monotonic() < deadline
        time.sleep(0.1)


MISFITS = {
    "it serves another model: .*hidden_size": {"options": {"hidden_size": 256}},
    "--dtype is float32; start it with bfloat16": {"dtype": torch.bfloat16},
    "--max-model-len is 96; samples may have 97 tokens": {"longest": 97},
}


@pytest.mark.parametrize("message", MISFITS)
def test_a_server_of_another_kind_is_refused(message, address, backend, folder, tmp_path):
    other = dict(MISFITS[message])
    if options := other.pop("options", None):
        folder = tmp_path / "other"
        registry.load("models", "tiny_qwen2_5_vl")(folder, layers=2, vision_layers=2, **options)
    with pytest.raises(ConfigError, match=f"{address}: {message}"):
        build(backend, folder, addresses=[address], **other)


def test_the_engine_in_process_draws_the_same_from_the_same_seeds(engine, model, prompts, backend, folder):
    """Tokens equal; log-probabilities to 1e-5, the rounding of another batch."""
    from vllm import SamplingParams

    rollout = build(backend, folder, "vllm", max_num_seqs=16)
    rollout.load_weights(model.named_parameters(), 1)
    ours = engine.generate(prompts, SAMPLING)
    for place, group in enumerate(ours):
        parameters = SamplingParams(
            n=3, max_tokens=12, logprobs=0, seed=seed_of(SAMPLING.seed, place), ignore_eos=True,
            stop_token_ids=sorted(rollout._family.stop_token_ids),
        )  # fmt: skip
        request = {"prompt_token_ids": group.prompt.engine_token_ids}
        if group.prompt.row.images:
            request["multi_modal_data"] = {"image": list(group.prompt.row.images)}
        (output,) = rollout._llm.generate(request, parameters, use_tqdm=False)
        for sample, completion in zip(group.samples, output.outputs, strict=True):
            assert sample.token_ids.tolist() == list(completion.token_ids)
            theirs = [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)]
            assert abs(sample.logprobs - torch.tensor(theirs).numpy()).max() < 1e-5


def test_a_run_learns_through_the_server(address, folder, tmp_path):
    """It takes the server over: the connections of the tests before are no more."""
    settings = {
        "model": {"path": str(folder), "precision": "fp32"},
        "data": {"train": {"name": "arithmetic", "options": {"count": 64, "max_value": 9}}, "max_prompt_tokens": 48},
        "rollout": {"engine": "vllm_server", "max_new_tokens": 12, "options": {"addresses": [address]}},
        "reward": [{"name": "rlcore.diagnose.conformance.learning.digits"}],
        "algorithm": {"group_size": 8},
        "optimizer": {"lr": 3e-3},
        "train": {"steps": STEPS, "prompts_per_step": 4, "max_tokens_per_microbatch": 1024},
        "placement": {"offload": ["engine"]},
        "logging": {"tensorboard": False, "samples_on_console": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-m", "rlcore", "grpo", "run.yaml", "--backend", "cpu", "--run-dir", "run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = [one["grpo/score/mean"] for one in rows]
    assert sum(scores[-2:]) > sum(scores[:2]) + 0.2, scores
    assert max(one["mismatch/max"] for one in rows) < 1e-3
    versions = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {one["policy_version"] for one in versions} == set(range(STEPS))


def test_an_engine_that_is_killed_under_its_server_ends_the_run_with_its_last_words(served, prompts, address):
    """The last test: the server does not survive it. It serves the last weights of the run before, which left it paused."""
    served.resume()
    served.version = STEPS - 1
    guard = psutil.Process(served._fleet.servers[0].process.pid)
    (core,) = (child for child in guard.children(recursive=True) if "EngineCore" in " ".join(child.cmdline() or [child.name()]))
    stream = served.stream(prompts[1:2] * 16, Sampling(samples=4, max_new_tokens=60))
    next(stream)
    os.kill(core.pid, signal.SIGKILL)
    said = rf"{address} \(pid {guard.pid}\) (.|\n)*the end of its log:(.|\n)*no other server is left"
    with pytest.raises(RunError, match=said):
        list(stream)
    assert not guard.is_running()
