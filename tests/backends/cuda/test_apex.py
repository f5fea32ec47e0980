"""AdamW of NVIDIA apex: torch's numbers and checkpoints, and only the real package. Its kernels are simulated."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saving import save
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from rlcore import registry
from rlcore.config.sections import OptimizerConfig
from rlcore.errors import ConfigError, PluginError
from rlcore.model.optimizer import Learner

CUDA = registry.load("backends", "cuda")
STEPS = 6


@pytest.fixture(autouse=True)
def _imported_anew():
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


@pytest.fixture
def apex(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "simulated_apex")


class Model(nn.Module):
    """A matrix and a vector with a gradient in every step, and a matrix with one in every second step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.always, self.vector = nn.Linear(5, 4, bias=False), nn.Parameter(torch.randn(4))
        self.sometimes = nn.Linear(4, 3, bias=False)


def learner(optimizer):
    return Learner(Model(), OptimizerConfig(lr=0.1, weight_decay=0.1), STEPS, CUDA(CUDA.Options(optimizer=optimizer)).adamw)


def go_on(learner, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, parameter in learner.model.named_parameters():
            if step % 2 or "sometimes" not in name:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        learner.optimizer.param_groups[0]["lr"] = learner.optimizer.param_groups[1]["lr"] = 0.1 / (1 + step)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        learner.steps += 1
    return learner


def test_it_takes_the_steps_of_torch(apex):
    ours, torchs = go_on(learner("apex"), range(STEPS)), go_on(learner("torch"), range(STEPS))
    assert type(ours.optimizer).__mro__[1].__module__ == "apex.optimizers"
    for (name, one), other in zip(ours.model.named_parameters(), torchs.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6), name


def test_parameters_that_have_taken_equally_many_steps_share_a_call(apex):
    ours = learner("apex")
    for parameter in ours.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    ours.optimizer.step()
    assert ours.optimizer.calls == 2, "one for matrices, one for vectors"


@pytest.mark.parametrize(("first", "then"), [("apex", "torch"), ("torch", "apex"), ("apex", "apex")])
def test_what_one_saved_the_other_goes_on_with(apex, tmp_path, first, then):
    half = STEPS // 2
    saved = go_on(learner(first), range(half))
    save(saved, tmp_path)
    save(go_on(learner("torch"), range(half)), tmp_path / "torch")
    mine, theirs = load_file(tmp_path / "optimizer.safetensors"), load_file(tmp_path / "torch" / "optimizer.safetensors")
    assert {name: (each.shape, each.dtype) for name, each in mine.items()} == {
        name: (each.shape, each.dtype) for name, each in theirs.items()
    }
    assert (mine["always.weight.step"], mine["sometimes.weight.step"]) == (3, 1)
    other = learner(then)
    other.model.load_state_dict(saved.model.state_dict())
    other.load(tmp_path)
    assert other.steps == half
    go_on(other, range(half, STEPS))
    for one, expected in zip(other.model.parameters(), go_on(learner("torch"), range(STEPS)).model.parameters(), strict=True):
        assert torch.allclose(one, expected, rtol=1e-5, atol=1e-6)


def test_without_apex_the_error_says_where_it_is_from():
    with pytest.raises(PluginError, match=r"apex: it is not installed; build .*github\.com/NVIDIA/apex.*optimizer: torch"):
        learner("apex")


def test_the_apex_of_pypi_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('imported')\n")
    with pytest.raises(PluginError, match=r"is not the one with fused optimizers; PyPI's apex is a toolkit for Pyramid"):
        learner("apex")


@pytest.mark.parametrize(("missing", "said"), [("amp_C", "does not import: .*amp_C"), ("kernels", "without its kernels")])
def test_an_apex_that_was_built_without_its_kernels_is_refused(apex, monkeypatch, missing, said):
    if missing == "amp_C":
        monkeypatch.setitem(sys.modules, "amp_C", None)
    else:
        from apex.multi_tensor_apply import multi_tensor_applier

        monkeypatch.setattr(multi_tensor_applier, "available", False)
    with pytest.raises(PluginError, match=said):
        learner("apex")


def test_weights_that_are_dealt_over_devices_are_refused(apex):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model, mesh = nn.Linear(4, 3), init_device_mesh("cpu", (1,))
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh))
        with pytest.raises(ConfigError, match="these weights are dealt over several devices; set optimizer: torch"):
            Learner(model, OptimizerConfig(), 1, CUDA(CUDA.Options(optimizer="apex")).adamw)
    finally:
        distributed.destroy_process_group()
