"""`rlcore eval` with vLLM: each set's sampling settings are in vLLM's own parameters, and greedy answers are the plain
sampler's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from rlcore_backends.vllm.rollout import VllmRollout
from run_files import settings

from rlcore import registry
from rlcore.cli.main import main

SEEDS = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "samples": 4}


def graded(response, answer, fields):
    return len(set(response)) / 10


@pytest.fixture
def requests(monkeypatch):
    """vLLM's parameters of every call."""
    given, real = [], VllmRollout._parameters

    def recorded(self, sampling):
        given.append(real(self, sampling))
        return given[-1]

    monkeypatch.setattr(VllmRollout, "_parameters", recorded)
    return given


def test_each_set_is_sampled_under_its_own_settings(tmp_path, models, monkeypatch, requests):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    folder = models / "evaluated_llama"
    registry.load("models", "tiny_llama")(folder, hidden_size=256, layers=2)
    rows = {"name": "arithmetic", "options": {"split": "test", "count": 5}}
    values = settings(
        folder, data={"eval": {"greedy": rows, "seeds": {**rows, **SEEDS, "max_new_tokens": 9}}, "max_prompt_tokens": 64},
        evaluation={"max_new_tokens": 6}, reward=[{"name": "test_vllm_evaluate.graded"}],
        backend={"options": {"threads": 1, "kv_cache_gib": 0.1}},
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    told = {}
    for engine in ("vllm", "torch"):
        out = tmp_path / engine
        assert main(["eval", str(tmp_path / "run.yaml"), f"rollout.engine={engine}", "--run-dir", str(out)]) == 0
        samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        told[engine] = {name: [one for one in samples if one["set"] == name] for name in ("greedy", "seeds")}
    read = [(one.n, one.max_tokens, one.temperature, one.top_p, one.top_k) for one in requests]
    assert read == [(1, 6, 0.0, 1.0, 0), (4, 9, 0.6, 0.95, 20)]
    assert told["vllm"]["greedy"] == told["torch"]["greedy"] and len(told["vllm"]["greedy"]) == 5
    assert [one["row"] for one in told["vllm"]["seeds"]] == [one["row"] for one in told["torch"]["seeds"]]
    assert max(one["response_tokens"] for one in told["vllm"]["seeds"]) == 9
    assert len({one["response"] for one in told["vllm"]["seeds"]}) > 10, "every row is sampled four times"
