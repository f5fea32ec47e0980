"""Offloaded tensors are off the device and come back unchanged; using them meanwhile is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from run_files import ARITHMETIC, write
from torch import nn

from rlcore import registry
from rlcore.cli.main import main
from rlcore.config.sections import RolloutConfig
from rlcore.monitor.clock import Clock
from rlcore.rollout import sampler as torch_sampler
from rlcore.runtime.memory import MemoryManager, OffloadedTensors, PhaseError, holding
from rlcore.types import Row, Sampling


@pytest.fixture
def model():
    tied = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    tied[1].weight = tied[0].weight
    return tied


def test_parked_weights_leave_and_come_back_to_the_bit(model):
    before, first = model[0].weight.detach().clone(), model[0].weight
    view = model[0].weight.detach()[2:3]
    offloaded = OffloadedTensors(model.parameters)
    assert offloaded.device_bytes() == 7 * 4 * 4, "tied weights are held once"
    offloaded.pause()
    assert offloaded.device_bytes() == 0 == first.untyped_storage().nbytes()
    offloaded.resume()
    assert model[0].weight is first is model[1].weight
    assert torch.equal(first, before) and torch.equal(view, before[2:3])


def test_a_storage_that_several_tensors_stand_on_is_parked_once():
    whole = torch.arange(12.0)
    parts = [whole[:4], whole[4:].view(2, 4), whole]
    offloaded = OffloadedTensors(lambda: parts)
    assert offloaded.device_bytes() == whole.nbytes
    offloaded.pause()
    offloaded.resume()
    assert torch.equal(whole, torch.arange(12.0)) and torch.equal(parts[1][1], torch.arange(8.0, 12.0))


def test_what_need_not_be_kept_comes_back_as_zeros(model):
    offloaded = OffloadedTensors(model.parameters, keep=False)
    offloaded.pause()
    offloaded.resume()
    assert not model[0].weight.any()


def test_an_optimizer_has_nothing_to_park_before_its_first_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    states = optimizer.state.values
    offloaded = OffloadedTensors(lambda: [value for state in states() for value in state.values() if value.dim()])
    offloaded.pause()
    offloaded.resume()
    model(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert offloaded.device_bytes() == 2 * 7 * 4 * 4
    offloaded.pause()
    offloaded.resume()
    optimizer.step()


class Part:
    def __init__(self):
        self.there = True

    def pause(self):
        assert self.there
        self.there = False

    def resume(self):
        assert not self.there
        self.there = True

    def device_bytes(self):
        return 2**30 * self.there


def test_a_phase_has_what_it_needs_and_only_that_of_what_may_leave():
    clock = Clock()
    memory_manager = MemoryManager(clock, ["engine", "optimizer", "parameters", "reference"])
    parts = {name: Part() for name in ("engine", "optimizer", "parameters", "reference")}
    for name, part in parts.items():
        memory_manager.register(name, part)

    def there():
        return {name for name, part in parts.items() if part.there}

    for phase, needed in (
        ("reshard", {"engine", "parameters"}), ("infer", {"engine"}), ("infer", {"engine"}), ("reference", {"reference"}),
        ("score", {"parameters"}), ("train", {"parameters", "optimizer"}), ("send", {"parameters"}),
    ):  # fmt: skip
        with memory_manager.phase(phase):
            assert there() == needed, phase
    memory = memory_manager.memory()
    assert memory == {
        "memory/reshard": 2, "memory/infer": 1, "memory/reference": 1, "memory/score": 1, "memory/train": 2, "memory/send": 1
    }  # fmt: skip
    stages = [span.stage for span in clock.take()]
    assert stages.count("ref_onload") == 1 and stages.count("ref_offload") == 2
    assert set(stages) == {"ref_onload", "ref_offload", "resharding_to_infer", "resharding_to_train"}


def test_the_memory_of_a_phase_is_the_most_of_its_visits():
    memory_manager = MemoryManager(Clock(), [])
    memory_manager.register("engine", Part())
    for parameters in (None, Part(), None):
        memory_manager.register("parameters", parameters)
        with memory_manager.phase("reshard"):
            pass
    memory_manager.note("train", extra=2**31)
    assert memory_manager.memory() == {"memory/reshard": 2, "memory/train": 3}
    assert memory_manager.memory() == {}, "each call begins anew"


def test_what_may_not_leave_stays():
    memory_manager, part = MemoryManager(Clock(), []), Part()
    memory_manager.register("engine", part)
    with memory_manager.phase("train"):
        assert part.there


def test_a_paused_engine_refuses_weights_and_prompts(tiny_llama, backend):
    family = registry.load("families", "llama")(tiny_llama)
    engine = torch_sampler.build(family, tiny_llama, backend, RolloutConfig(), torch.float32, 64, 0)
    prompt = family.encode(Row("a", [{"role": "user", "content": "3 + 4?"}]))
    before = engine.generate([prompt], Sampling(2, 4))
    engine.pause()
    with pytest.raises(PhaseError, match="sampling was asked of an engine that is paused; resume it first"):
        engine.generate([prompt], Sampling(2, 4))
    with pytest.raises(PhaseError, match="a weight update was asked of an engine that is paused"):
        engine.load_weights([], 1)
    engine.resume()
    for now, then in zip(engine.generate([prompt], Sampling(2, 4))[0].samples, before[0].samples, strict=True):
        assert now.token_ids.tolist() == then.token_ids.tolist()
        assert now.logprobs == pytest.approx(then.logprobs, abs=1e-5), "to rounding: they lie elsewhere in memory"


def test_an_engine_without_weights_refuses_prompts_and_says_what_it_needs():
    assert holding(0) == 0, "those that it was started with"
    with pytest.raises(PhaseError, match="when it was paused, or whose last update failed; send it weights first"):
        holding(None)


def test_an_engine_that_gives_up_its_weights_is_sent_them_before_every_sampling(tmp_path, tiny_llama, monkeypatch):
    """After a warm start and a resume, and between an evaluation and the next step if a checkpoint paused the engine."""

    class Forgetful(torch_sampler.TorchRollout):
        def pause(self):
            super().pause()
            self.version = None

        def stream(self, prompts, sampling):
            holding(self.version)
            return super().stream(prompts, sampling)

    sections = {
        "placement": {"offload": ["engine"]}, "evaluation": {"every": 1, "max_new_tokens": 4},
        "sft": {"steps": 1, "rows_per_step": 2}, "train": {"steps": 3, "prompts_per_step": 2, "save_every": 1},
        "data": {"train": ARITHMETIC, "eval": ARITHMETIC, "max_prompt_tokens": 64},
    }  # fmt: skip
    file = str(write(tmp_path, tiny_llama, **sections))
    lines = {}
    for name, engine in (("kept", torch_sampler.TorchRollout), ("given up", Forgetful)):
        monkeypatch.setattr(torch_sampler, "TorchRollout", engine)
        folder = ["--run-dir", str(tmp_path / name)]
        assert main(["grpo", file, "train.steps=1", *folder]) == 0
        assert main(["grpo", file, "--resume", *folder]) == 0
        lines[name] = (tmp_path / name / "samples.jsonl").read_text()
    assert lines["kept"] == lines["given up"]


def test_peak_memory_is_this_programs_and_not_that_of_the_one_that_started_it():
    child = "from rlcore.runtime.memory import peak_rss as p; first = p(); held = b'1' * 2**28; print(first, p() - first)"
    parent = f"held = b'1' * 2**31; import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    first, more = map(int, subprocess.check_output([sys.executable, "-c", parent]).split())
    assert first < 2**31 and more > 2**27
