"""Sleeping engines: what leaves the device at each level, when it comes back, and which calls are allowed meanwhile.

Uses vLLM's own engine and scheduler on the CPU. Its CPU worker cannot sleep, so a stand-in does to the tensors what the
allocator does on a GPU.
"""

from __future__ import annotations

import gc
import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlcore import registry
from rlcore.config.sections import LoraConfig, RolloutConfig
from rlcore.distributed.fingerprint import Constants
from rlcore.errors import RunError
from rlcore.monitor.heartbeat import no_heartbeat
from rlcore.runtime.memory import PhaseError
from rlcore.types import Row, Sampling

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
SAMPLING = Sampling(1, 8, temperature=0)


@pytest.fixture(scope="module")
def folder(models):
    registry.load("models", "tiny_qwen2_5_vl")(models / "sleeping_vl", layers=2, vision_layers=2)
    return models / "sleeping_vl"


@pytest.fixture(scope="module")
def started(folder, backend):
    family = registry.load("families", "qwen2_5_vl")(folder)
    return registry.load("rollout_engines", "vllm")(family, folder, backend, RolloutConfig(), torch.float32, 128, 0)


@pytest.fixture(scope="module")
def prompts(folder):
    family = registry.load("families", "qwen2_5_vl")(folder)
    return [family.encode(Row("a", [{"role": "user", "content": [{"type": "text", "text": "What is 4 + 5?"}]}]))]


@pytest.fixture
def weights(folder, started):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    started.load_weights(model.named_parameters(), 0)
    return dict(model.named_parameters())


class Memory:
    """A worker's memory; tensors in released memory become NaN."""

    def __init__(self, runner):
        self.runner, self.kept, self.calls = runner, {}, []
        self.lost, self.spoiled = {}, {}  # name -> (tensor, original) not restored by waking weights / the cache

    def loses(self, *names, cache=False):
        """Name buffers or layer attributes that waking the weights (or the cache) fails to restore."""
        for name in names:
            layer, _, leaf = name.rpartition(".")
            tensor = getattr(self.runner.get_model().get_submodule(layer), leaf)
            (self.spoiled if cache else self.lost)[name] = tensor, tensor.clone()

    def lose(self, names):
        for tensor, _ in names.values():
            tensor.zero_()

    def restore(self):
        """Restore all lost tensors and lose nothing more."""
        for tensor, kept in (self.lost | self.spoiled).values():
            tensor.copy_(kept)
        self.lost, self.spoiled = {}, {}

    def sleep(self, level=1):
        assert self.calls.count("wake kv_cache") == sum("sleep" in call for call in self.calls), "all of it is awake"
        self.calls.append(f"sleep {level}")
        model = self.runner.get_model()
        kept = {"buffers": model.named_buffers(), "weights": model.named_parameters() if level == 1 else ()}
        self.kept |= {tag: {name: tensor.detach().clone() for name, tensor in of} for tag, of in kept.items()}
        with torch.no_grad():
            scratch = getattr(model, "deepstack_input_embeds", ()) if level == 2 else ()
            for tensor in (*model.parameters(), *model.buffers(), *self.runner.kv_caches, *scratch):
                tensor.fill_(torch.nan)

    def wake_up(self, tags=None):
        self.calls.append(f"wake {', '.join(tags)}")
        if "weights" in tags:
            model = self.runner.get_model()
            held = dict(model.named_parameters()) | dict(model.named_buffers())
            with torch.no_grad():
                for name, tensor in (self.kept["weights"] | self.kept["buffers"]).items():
                    held[name].copy_(tensor)
        self.lose(self.lost if "weights" in tags else self.spoiled)
        if "kv_cache" in tags:
            for cache in self.runner.kv_caches:
                cache.zero_()


@pytest.fixture
def sleeping(started, weights, monkeypatch):
    """The engine at a sleep level, and its memory."""
    worker = started._llm.llm_engine.model_executor.driver_worker.worker
    memory = Memory(started._runner)
    monkeypatch.setattr(worker, "sleep", memory.sleep)
    monkeypatch.setattr(worker, "wake_up", memory.wake_up)

    def at(level):
        monkeypatch.setattr(started, "_level", level)
        return started, memory

    yield at
    memory.restore()
    started.resume()
    started.load_weights(weights.items(), 0)
    started.generate([], SAMPLING)


@pytest.mark.parametrize(("enabled", "asked", "level"), [(True, 1, 1), (True, 2, 2), (True, 0, 1), (False, 2, 0)])
def test_the_level_of_sleep_is_the_backends(enabled, asked, level):
    """If vLLM's sleep mode is on, which rollout.options may also set."""
    from rlcore_backends.vllm import engine as vllm_engine

    settings = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=enabled))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=settings))
    assert vllm_engine._sleep_level(llm, SimpleNamespace(options=SimpleNamespace(sleep_level=asked))) == level


def drawn(engine, prompts):
    return [sample.token_ids.tolist() for group in engine.generate(prompts, SAMPLING) for sample in group.samples]


def sizes(engine):
    """Bytes in total, and of the weights alone."""
    everything = engine.device_bytes()
    return everything, everything - sum(cache.nbytes for cache in engine._runner.kv_caches)


def test_weights_that_are_given_up_must_be_sent_before_anything_is_sampled(sleeping, weights, prompts):
    engine, memory = sleeping(2)
    before, (everything, alone) = drawn(engine, prompts), sizes(engine)
    engine.pause()
    assert engine.device_bytes() == 0 and engine.version is None
    with pytest.raises(PhaseError, match="a weight update was asked of an engine that is paused"):
        engine.load_weights(weights.items(), 1)
    engine.resume()
    assert engine.device_bytes() == alone, "the cache waits until something is sampled"
    with pytest.raises(PhaseError, match=r"sampling was asked of an engine that gave up its weights .* send it weights first"):
        engine.generate(prompts, SAMPLING)
    receipt = engine.load_weights(weights.items(), 1)
    assert receipt.tensors == len(weights) and engine.version == 1
    assert memory.calls == ["sleep 2", "wake weights"] and engine.device_bytes() == alone
    assert drawn(engine, prompts) == before
    assert memory.calls == ["sleep 2", "wake weights", "wake kv_cache"] and engine.device_bytes() == everything


def test_an_update_that_fails_leaves_the_engine_without_weights(sleeping, weights, prompts):
    engine, _ = sleeping(2)
    engine.pause()
    engine.resume()
    with pytest.raises(Exception, match="weight sync"):
        engine.load_weights(list(weights.items())[:-1], 1)
    with pytest.raises(PhaseError, match="gave up its weights"):
        engine.generate(prompts, SAMPLING)


def test_weights_that_wait_on_the_host_are_served_again(sleeping, prompts):
    engine, memory = sleeping(1)
    before, (everything, alone) = drawn(engine, prompts), sizes(engine)
    engine.pause()
    assert engine.device_bytes() == 0 and engine.version == 0
    engine.resume()
    assert engine.device_bytes() == alone
    assert drawn(engine, prompts) == before
    assert memory.calls == ["sleep 1", "wake weights", "wake kv_cache"] and engine.device_bytes() == everything


def test_without_sleep_the_cache_alone_leaves_and_comes_back_for_sampling(sleeping, weights, prompts):
    engine, memory = sleeping(0)
    before, (everything, alone) = drawn(engine, prompts), sizes(engine)
    engine.pause()
    assert engine.device_bytes() == alone and engine.version == 0
    engine.resume()
    engine.load_weights(weights.items(), 1)
    assert engine.device_bytes() == alone
    assert drawn(engine, prompts) == before
    assert memory.calls == [] and engine.device_bytes() == everything


@pytest.mark.parametrize("level", [0, 1, 2])
def test_an_engine_may_leave_again_before_it_has_sampled(sleeping, weights, prompts, level):
    engine, _ = sleeping(level)
    before = drawn(engine, prompts)
    for version in (1, 2):
        engine.pause()
        engine.resume()
        engine.load_weights(weights.items(), version)
    assert drawn(engine, prompts) == before


POSITIONS = "language_model.model.layers.0.self_attn.rotary_emb.cos_sin_cache"
VISION = "visual.rotary_pos_emb.cos_sin_cache"
SCALE = "language_model.model.layers.1.self_attn.attn._k_scale"
ATTRIBUTE = "language_model.model.layers.1.self_attn.attn.mask"


def lost(event, name):
    return rf"weight sync: {event} left the engine without .* 1 different: {re.escape(name)}; .* stops here; "


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("name", [POSITIONS, VISION, SCALE])
def test_a_buffer_that_a_wake_does_not_bring_back_is_named_at_once(sleeping, prompts, level, name):
    """As happened at level 2 with Gemma 4 (NeMo-RL #2631)."""
    engine, memory = sleeping(level)
    memory.loses(name)
    engine.pause()
    event = f"waking the weights of an engine that slept at level {level}"
    with pytest.raises(RunError, match=lost(event, name) + rf"set backend\.options\.sleep_level={level - 1}$"):
        engine.resume()
    with pytest.raises(PhaseError, match="paused"):
        engine.generate(prompts, SAMPLING)


@pytest.mark.parametrize("level", [1, 2])
def test_a_buffer_that_the_wake_of_the_cache_spoils_is_named_before_anything_is_sampled(sleeping, weights, prompts, level):
    """vLLM rewrites scales of a float8 cache there."""
    engine, memory = sleeping(level)
    engine.pause()
    engine.resume()
    engine.load_weights(weights.items(), 1)
    memory.loses(SCALE, cache=True)
    for _ in range(2):
        with pytest.raises(RunError, match=lost(f"waking the cache of an engine that slept at level {level}", SCALE)):
            engine.generate(prompts, SAMPLING)


@pytest.mark.parametrize("name", [POSITIONS, VISION])
def test_a_buffer_that_changes_while_the_cache_alone_is_away_is_named(sleeping, name):
    engine, memory = sleeping(0)
    memory.loses(name)
    engine.pause()
    memory.lose(memory.lost)
    event = "waking the weights of an engine that slept at level 0"
    with pytest.raises(RunError, match=lost(event, name) + r"set rollout\.engine=torch$"):
        engine.resume()


@pytest.fixture
def mask(started, monkeypatch):
    """An unregistered tensor of a layer: after level 2 vLLM restores only buffers."""
    layer = started._runner.get_model().get_submodule(ATTRIBUTE.rpartition(".")[0])
    layer.mask = torch.ones(4)
    with monkeypatch.context() as patch:
        patch.setattr(started, "_constants", Constants(started._runner.get_model(), started._runner.kv_caches))
        yield
    del layer.mask


def test_an_attribute_that_a_wake_does_not_bring_back_is_named_at_once_where_weights_are_kept(mask, sleeping):
    engine, memory = sleeping(1)
    memory.loses(ATTRIBUTE)
    engine.pause()
    with pytest.raises(RunError, match=lost("waking the weights of an engine that slept at level 1", ATTRIBUTE)):
        engine.resume()


def test_an_attribute_that_is_given_up_with_the_weights_is_named_by_the_next_update(mask, sleeping, weights):
    """At wake-up it might still be one that the update recreates."""
    engine, memory = sleeping(2)
    memory.loses(ATTRIBUTE)
    engine.pause()
    engine.resume()
    for version in (1, 2):
        with pytest.raises(RunError, match=lost(f"the update to version {version}", ATTRIBUTE)):
            engine.load_weights(weights.items(), version)
        engine.pause()
        engine.resume()


def test_weights_that_nobody_sends_again_are_never_given_up(started, folder):
    from rlcore_backends.vllm.lora import VllmLoraRollout

    family = registry.load("families", "qwen2_5_vl")(folder)
    for level, own in ((0, 0), (1, 1), (2, 1)):
        assert VllmLoraRollout(started._llm, family, no_heartbeat, level, torch.float32, LoraConfig())._level == own


def test_an_engine_holds_nothing_that_neither_a_sync_nor_vllm_brings_back(started):
    """vLLM keeps buffers when it discards weights; other tensors would be lost. The two scales here are for ROCm."""
    loose = {
        name for layer in started._runner.get_model().modules() for name, value in vars(layer).items()
        if isinstance(value, torch.Tensor)
    }  # fmt: skip
    assert loose == {"kv_cache", "_k_scale_cpu", "_v_scale_cpu"}


def moved(folder, dtype, step):
    """The weights of a policy after `step` updates."""
    kind = AutoModelForImageTextToText if "vl" in folder.name else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(step * 0.01)
    return model.named_parameters()


@pytest.fixture
def no_engine_ends():
    """Garbage collection of an engine tears down vLLM's process groups, even those of one just starting."""
    gc.collect()
    yield
    gc.collect()


MODELS = [("llama", torch.float32), ("llama", torch.bfloat16), ("qwen2_5_vl", torch.float32), ("qwen2_5_vl", torch.bfloat16)]


@pytest.mark.parametrize(("kind", "dtype"), [*MODELS, ("qwen3_vl", torch.float32)])
def test_updates_sleeps_wakes_and_samples_are_no_fault(no_engine_ends, models, backend, monkeypatch, kind, dtype):
    """Biases of a bfloat16 model are in float32 on a CPU with AMX. Qwen3-VL keeps tensors in a list, which level 2 loses."""
    folder = models / f"faultless_{kind}"
    sizes = {"layers": 2, "vision_layers": 2} if "vl" in kind else {"layers": 2}
    registry.load("models", f"tiny_{kind}")(folder, **sizes)
    family = registry.load("families", kind)(folder)
    engine = registry.load("rollout_engines", "vllm")(family, folder, backend, RolloutConfig(), dtype, 128, 0)
    memory = Memory(engine._runner)
    worker = engine._llm.llm_engine.model_executor.driver_worker.worker
    monkeypatch.setattr(worker, "sleep", memory.sleep)
    monkeypatch.setattr(worker, "wake_up", memory.wake_up)
    images = [Image.new("RGB", (112, 112), "red")] if "vl" in kind else []
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "4 + 5?"}]
    prompts = [family.encode(Row("a", [{"role": "user", "content": content}], images=images))]
    assert len(engine._constants._loaded) > 8
    before = {}
    for level in (0, 1, 2):
        monkeypatch.setattr(engine, "_level", level)
        for version in (1, 2, 3):
            engine.load_weights(moved(folder, dtype, version), version)
            sampled = drawn(engine, prompts)
            assert before.setdefault(version, sampled) == sampled
            engine.pause()
            engine.resume()
            assert level == 2 or len(drawn(engine, prompts)) == 1
