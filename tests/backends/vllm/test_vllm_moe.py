"""Experts in vLLM on a CPU: every update reaches its kernels, and one that does not is an error."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from run_files import write

from rlcore import registry
from rlcore.algorithms import aggregation
from rlcore.algorithms.objective import Objective, tokens
from rlcore.algorithms.schedule import MinibatchSchedule
from rlcore.algorithms.sft import negative_log_likelihood
from rlcore.cli.main import main
from rlcore.config.sections import OptimizerConfig, RolloutConfig
from rlcore.errors import ConfigError, RunError
from rlcore.model.actor import TorchActor
from rlcore.model.forward import ForwardSettings
from rlcore.model.loaded import LoadedModel
from rlcore.types import Batch, Row, Sampling

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

EXPERTS = 6


def folder_of(models, size):
    """Heads of 64, the least that vLLM takes. Experts of 64 fit its CPU kernels, those of 48 are padded."""
    folder = models / f"moe_{size}"
    registry.load("models", "tiny_qwen3_moe")(folder, hidden_size=256, layers=2, experts=EXPERTS, expert_size=size)
    return folder


@pytest.fixture(scope="module")
def served(models, backend):
    """An actor, an engine and prompts."""
    folder = folder_of(models, 64)
    family = registry.load("families", "qwen3_moe")(folder)
    objective = Objective(negative_log_likelihood, aggregation.token_mean, tokens)
    settings = ForwardSettings(torch.device("cpu"), torch.float32, 512, 1.0)
    loaded, schedule = LoadedModel(family.load(folder, torch.float32), family), MinibatchSchedule(total_steps=9)
    actor = TorchActor(loaded, settings, objective, OptimizerConfig(lr=2e-2), schedule)
    engine = registry.load("rollout_engines", "vllm")(family, folder, backend, RolloutConfig(), torch.float32, 128, 0)
    rows = [Row(str(number), [{"role": "user", "content": f"{number} + {number}?"}]) for number in range(3)]
    return actor, engine, [family.encode(row) for row in rows]


def gap(actor, engine, prompts):
    batch = Batch.of(engine.generate(prompts, Sampling(4, 8)))
    return float((actor.logprobs(batch) - batch.rollout_logprobs).abs().max())


def test_an_update_is_served(served):
    actor, engine, prompts = served
    assert gap(*served) < 1e-4
    actor.update(Batch.of(engine.generate(prompts, Sampling(4, 8))))
    assert gap(*served) > 0.1, "an update that no engine needs to be sent"
    receipt = engine.load_weights(actor.weights(), 1)
    assert receipt.tensors == 2 + 2 * (9 + EXPERTS * 3) and gap(*served) < 1e-4


def test_an_update_that_leaves_experts_unpacked_is_found(served, monkeypatch):
    """What vLLM 0.32 does without the cure."""
    actor, engine, _ = served
    with monkeypatch.context() as patch:
        patch.setattr("rlcore_backends.vllm.internals.forget_kernels", lambda _: None)
        with pytest.raises(RunError, match=rf"{2 * EXPERTS * 3} different: model\.layers\.0\.mlp\.experts\.0\."):
            engine.load_weights(actor.weights(), 2)
    assert engine.version is None
    engine.load_weights(actor.weights(), 3)
    assert gap(*served) < 1e-4


WRONG = {
    "left out": (lambda name, tensor: None, r"1 missing .*: {0};"),
    "unknown": (lambda name, tensor: (name.replace("experts.3", "experts.6"), tensor), r"unexpected tensor .*experts\.6\."),
    "misshapen": (lambda name, tensor: (name, tensor[:, 1:]), r"{0} was sent as \[\d+, \d+\], the engine holds"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("kind", ["gate", "up", "down"])
def test_an_expert_that_is_sent_wrong_is_named(served, kind, fault):
    (actor, engine, _), (changed, said) = served, WRONG[fault]
    wrong = f"model.layers.1.mlp.experts.3.{kind}_proj.weight"
    sent = (changed(name, tensor) if name == wrong else (name, tensor) for name, tensor in actor.weights())
    with pytest.raises(RunError, match=said.format(wrong.replace(".", r"\."))):
        engine.load_weights(filter(None, sent), 4)


@pytest.mark.parametrize("kind", ["gate", "up", "down"])
def test_an_expert_that_the_engine_holds_wrong_is_named(served, kind, monkeypatch):
    actor, engine, _ = served
    load, wrong = engine._runner.reload_weights, f"model.layers.1.mlp.experts.3.{kind}_proj.weight"

    def scrambled(weights_iterator):
        load(weights_iterator=((name, tensor.flip(0) if name == wrong else tensor) for name, tensor in weights_iterator))

    monkeypatch.setattr(engine._runner, "reload_weights", scrambled)
    with pytest.raises(RunError, match=rf"{1 if kind == 'down' else 2} different: .*experts\.3\.{kind}_proj"):
        engine.load_weights(actor.weights(), 5)
    monkeypatch.undo()
    engine.load_weights(actor.weights(), 6)
    assert gap(*served) < 1e-4


def test_a_layout_that_cannot_be_verified_is_refused(served):
    from rlcore_backends.vllm import experts

    _, engine, _ = served
    model = engine._runner.get_model()
    method = next(layer for _, layer in experts.layers(model)).quant_method
    known = method.unquantized_backend
    method.unquantized_backend = type(known)["FLASHINFER_TRTLLM"]
    try:
        with pytest.raises(ConfigError, match=r"rollout\.options\.moe_backend: .* by FLASHINFER_TRTLLM, .*set it to triton"):
            experts.check(model)
    finally:
        method.unquantized_backend = known


def test_a_run_samples_what_it_trains(models, tmp_path):
    """Experts that the engine pads."""
    model = folder_of(models, 48)
    file = write(
        tmp_path, model, rollout={"engine": "vllm", "max_new_tokens": 4}, optimizer={"lr": 1e-2}, reward=[{"name": "math"}],
        algorithm={"group_size": 4, "entropy_coef": 0.1},
    )  # fmt: skip
    assert main(["grpo", str(file), "--run-dir", str(tmp_path / "run")]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [step for step in steps if "mismatch/max" in step]
    assert len(trained) == 2 and all(step["mismatch/max"] < 1e-4 and step["moe/load_max"] > 1 for step in trained)
