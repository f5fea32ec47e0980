"""Engines in a pool give the greedy answers of one local engine: data-parallel, tensor-parallel and in a separate pool; and a
tensor that one rank of an engine received wrongly is found on that rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rlcore.cli.main import main

APART = "{kind: ray, pools: {train: {roles: [actor]}, sample: {roles: [rollout]}}}"
PLACES = {"side by side": "{kind: ray, devices: 2, offload: [engine, parameters]}", "apart": APART}


def graded(response, answer, fields):
    return len(set(response)) / 10


@pytest.fixture(scope="module")
def run(models, tmp_path_factory, cluster):
    """Run the command with a model that has a head size that the engine's kernels support and heads that two ranks can split
    (4 of 64, 2 KV heads). Returns the held-out answers of the initial model, after checking that every step sampled from its
    own weights."""
    from rlcore import registry

    folder = models / "placed_llama"
    registry.load("models", "tiny_llama")(folder, hidden_size=256, layers=2)
    settings = {
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
    base = tmp_path_factory.mktemp("placements")
    (base / "run.yaml").write_text(yaml.safe_dump(settings))

    def start(name, *overrides, status=0):
        folder = base / name
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(Path(__file__).parent))
            assert main(["grpo", str(base / "run.yaml"), *overrides, "--run-dir", str(folder)]) == status, name
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
        assert [step["mismatch/max"] < 1e-4 for step in steps] == [True, True], "the second step samples from new weights"
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        return [sample["response"] for sample in samples if sample["phase"] == "eval"]

    return start


@pytest.fixture(scope="module")
def answers(run):
    return run("local", "placement.kind=local")


@pytest.mark.parametrize("place", PLACES)
def test_greedy_answers_and_parity_are_those_of_one_engine(place, run, answers):
    assert len(answers) == 6
    assert run(place, f"placement={PLACES[place]}") == answers


def spoiled(process):
    """The worker process class with an engine whose last rank corrupts one value of a layer at the third weight load."""

    class Spoiled(process):
        def call(self, method, arguments):
            answer = super().call(method, arguments)
            if method == "start_engine":
                assert not list(Path("/dev/shm").glob("*cpushm*")), "a run that is killed leaves nothing that stops the next"
                self.spoil()
            return answer

        def spoil(self):
            import torch

            runner, loads = self.worker.rollout._runner, []
            real = runner.reload_weights

            def reload_weights(**options):
                real(**options)
                loads.append(1)
                if self.worker.ranks.rank == 1 and len(loads) == 3:
                    with torch.no_grad():
                        runner.get_model().get_submodule("model.layers.1.input_layernorm").weight[3] += 0.5

            runner.reload_weights = reload_weights

    return Spoiled


def test_an_engine_of_two_ranks_answers_as_one_and_a_fault_on_one_rank_is_found(run, answers, monkeypatch, capsys):
    from rlcore_backends.ray import pools as ray_pools

    monkeypatch.setattr(ray_pools, "Process", spoiled(ray_pools.Process))
    settings = ["placement={kind: ray, devices: 2}", "rollout.tensor_parallel=2", "train.steps=3"]
    assert run("tensor-parallel", *settings, status=1) == answers
    assert "1 different: model.layers.1.input_layernorm.weight" in capsys.readouterr().err
