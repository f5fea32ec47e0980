"""An engine that sleeps: what leaves the device at each level, what comes back when, and what may be asked of it meanwhile.

vLLM's own engine and scheduler, on the processor. There its worker has nothing to put away, so that a stand-in does to the
tensors what the allocator does to those of a GPU.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from rlcore import registry
from rlcore.config import LoraConfig, RolloutConfig
from rlcore.pulse import unwatched
from rlcore.residence import PhaseError
from rlcore.types import Row, Sampling

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
SAMPLING = Sampling(1, 8, temperature=0)


@pytest.fixture(scope="module")
def folder(models):
    registry.load("models", "tiny_qwen2_5_vl")(models / "sleeping_vl", layers=2, vision_layers=2)
    return models / "sleeping_vl"


@pytest.fixture(scope="module")
def started(folder, backend):
    adapter = registry.load("adapters", "qwen2_5_vl")(folder)
    return registry.load("engines", "vllm")(adapter, folder, backend, RolloutConfig(), torch.float32, 128, 0)


@pytest.fixture(scope="module")
def prompts(folder):
    adapter = registry.load("adapters", "qwen2_5_vl")(folder)
    return [adapter.encode(Row("a", [{"role": "user", "content": [{"type": "text", "text": "What is 4 + 5?"}]}]))]


@pytest.fixture
def weights(folder, started):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    started.load_weights(model.named_parameters(), 0)
    return dict(model.named_parameters())


class Memory:
    """Of a worker: what lies in memory that is given up is no number afterwards."""

    def __init__(self, runner):
        self.runner, self.kept, self.calls = runner, {}, []

    def sleep(self, level=1):
        assert self.calls.count("wake kv_cache") == sum("sleep" in call for call in self.calls), "all of it is awake"
        self.calls.append(f"sleep {level}")
        model = self.runner.get_model()
        kept = {"buffers": model.named_buffers(), "weights": model.named_parameters() if level == 1 else ()}
        self.kept |= {tag: {name: tensor.detach().clone() for name, tensor in of} for tag, of in kept.items()}
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers(), *self.runner.kv_caches):
                tensor.fill_(torch.nan)

    def wake_up(self, tags=None):
        self.calls.append(f"wake {', '.join(tags)}")
        if "weights" in tags:
            model = self.runner.get_model()
            held = dict(model.named_parameters()) | dict(model.named_buffers())
            with torch.no_grad():
                for name, tensor in (self.kept["weights"] | self.kept["buffers"]).items():
                    held[name].copy_(tensor)
        if "kv_cache" in tags:
            for cache in self.runner.kv_caches:
                cache.zero_()


@pytest.fixture
def sleeping(started, weights, monkeypatch):
    """The engine as it is at a level, and its memory."""
    worker = started._llm.llm_engine.model_executor.driver_worker.worker
    memory = Memory(started._runner)
    monkeypatch.setattr(worker, "sleep", memory.sleep)
    monkeypatch.setattr(worker, "wake_up", memory.wake_up)

    def at(level):
        monkeypatch.setattr(started, "_level", level)
        return started, memory

    yield at
    started.resume()
    started.load_weights(weights.items(), 0)
    started.generate([], SAMPLING)


@pytest.mark.parametrize(("enabled", "asked", "level"), [(True, 1, 1), (True, 2, 2), (True, 0, 1), (False, 2, 0)])
def test_the_level_of_sleep_is_the_backends(enabled, asked, level):
    """Where vLLM's sleep mode is on, which rollout.options may say too."""
    from rlcore_backends import vllm_rollout

    settings = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=enabled))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=settings))
    assert vllm_rollout._sleep_level(llm, SimpleNamespace(options=SimpleNamespace(sleep_level=asked))) == level


def drawn(engine, prompts):
    return [sample.token_ids for group in engine.generate(prompts, SAMPLING) for sample in group.samples]


def sizes(engine):
    """Bytes of everything, and of the weights alone."""
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


def test_weights_that_nobody_sends_again_are_never_given_up(started, folder):
    from rlcore_backends.vllm_additions import VllmAdditionsRollout

    adapter = registry.load("adapters", "qwen2_5_vl")(folder)
    for level, own in ((0, 0), (1, 1), (2, 1)):
        assert VllmAdditionsRollout(started._llm, adapter, unwatched, level, torch.float32, LoraConfig())._level == own


def test_an_engine_holds_nothing_that_neither_a_sync_nor_vllm_brings_back(started):
    """vLLM keeps buffers when it gives up weights; a tensor that is neither would be lost. What these two hold is for ROCm."""
    loose = {
        name for layer in started._runner.get_model().modules() for name, value in vars(layer).items()
        if isinstance(value, torch.Tensor)
    }  # fmt: skip
    assert loose == {"kv_cache", "_k_scale_cpu", "_v_scale_cpu"}
