"""Engines in a pool give the greedy answers of one local engine: data-parallel, tensor-parallel and in a separate pool; and a
tensor that one rank of an engine received wrongly is found on that rank."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from rlcore.cli.main import main
from rlcore.config.schema import RunConfig
from rlcore.errors import RunError
from rlcore.model.resolved import ResolvedModel
from rlcore.runtime.watchdog import Watchdog

APART = "{kind: ray, pools: {train: {roles: [actor]}, sample: {roles: [rollout]}}}"
PLACES = {
    "local": ["placement.kind=local"],
    "side by side": ["placement={kind: ray, devices: 2, offload: [engine, parameters]}"],
    "tensor-parallel": ["placement={kind: ray, devices: 2}", "rollout.tensor_parallel=2"],
    "apart": [f"placement={APART}"],
}


def graded(response, answer, fields):
    return len(set(response)) / 10


@pytest.fixture(scope="module")
def settings(models, tmp_path_factory):
    """A model with a head size that the engine's kernels support and heads that two ranks can split: 4 of 64, 2 KV heads."""
    from rlcore import registry

    folder = models / "placed_llama"
    registry.load("models", "tiny_llama")(folder, hidden_size=256, layers=2)
    return {
        "model": {"path": str(folder), "precision": "fp32"}, "backend": {"options": {"threads": 1, "kv_cache_gib": 0.1}},
        "data": {
            "train": {"name": "arithmetic", "options": {"count": 64, "max_value": 9}}, "max_prompt_tokens": 64,
            "eval": {"name": "arithmetic", "options": {"split": "test", "count": 6}},
        },
        "rollout": {"engine": "vllm", "max_new_tokens": 6}, "reward": [{"name": "test_vllm_placement.graded"}],
        "algorithm": {"group_size": 4}, "optimizer": {"lr": 1e-2},
        "train": {"steps": 2, "prompts_per_step": 4, "max_tokens_per_microbatch": 128},
        "evaluation": {"max_new_tokens": 8, "before": True, "at_end": False}, "logging": {"tensorboard": False},
    }  # fmt: skip


def test_greedy_answers_and_parity_are_those_of_one_engine(settings, tmp_path, cluster, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    answers = {}
    for name, overrides in PLACES.items():
        folder = tmp_path / name
        assert main(["grpo", str(tmp_path / "run.yaml"), *overrides, "--run-dir", str(folder)]) == 0, name
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        answers[name] = [sample["response"] for sample in samples if sample["phase"] == "eval"]
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
        assert [step["mismatch/max"] < 1e-4 for step in steps] == [True, True], "the second step samples from new weights"
    assert len(answers["local"]) == 6
    assert all(theirs == answers["local"] for theirs in answers.values())


def spoiled(process):
    """The worker process class with an engine whose last rank corrupts one value of a layer on weight load."""

    class Spoiled(process):
        def spoil(self):
            import torch

            runner = self.worker.rollout._runner
            real = runner.reload_weights

            def reload_weights(**options):
                real(**options)
                if self.worker.ranks.rank == 1:
                    with torch.no_grad():
                        runner.get_model().get_submodule("model.layers.1.input_layernorm").weight[3] += 0.5

            runner.reload_weights = reload_weights

    return Spoiled


def test_a_fault_on_one_rank_of_an_engine_is_found(settings, cluster, backend, monkeypatch):
    from rlcore_backends.ray import pools as ray_pools

    monkeypatch.setattr(ray_pools, "Process", spoiled(ray_pools.Process))
    placed = {"placement": {"kind": "ray", "devices": 2}, "rollout": {**settings["rollout"], "tensor_parallel": 2}}
    resolved = ResolvedModel(RunConfig.model_validate({**settings, **placed}), backend)
    with ray_pools.open_pools(resolved, Watchdog(0, Path())) as placement:
        placement.load("grpo")
        placement.start_engines()
        assert not list(Path("/dev/shm").glob("*cpushm*")), "a run that is killed leaves nothing that stops the next"
        placement.sync_weights()
        for member in placement.pools[0].members:
            member.ask(ray_pools.Process.spoil).result()
        placement.version += 1
        with pytest.raises(RunError, match=re.escape("1 different: model.layers.1.input_layernorm.weight")):
            placement.sync_weights()
