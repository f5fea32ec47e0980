"""The whole loop with real vLLM, as a user starts it: the quickstart's score rises and its metrics are consistent."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
STEPS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A quarter of the quickstart in fp32, in its own process."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    program = "import sys; from rlcore.cli.main import main; sys.exit(main(sys.argv[1:]))"
    settings = [f"train.steps={STEPS}", "data.train.options.count=512", "evaluation.every=0", "model.precision=fp32"]
    command = ["grpo", str(QUICKSTART), *settings, "--run-dir", str(folder)]
    result = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_score_rises(run):
    scores = [row["grpo/score/mean"] for row in lines(run / "metrics.jsonl") if row["step"]]
    assert fmean(scores[-4:]) > fmean(scores[:4]) + 0.1


def test_the_engine_samples_from_the_policy_that_learns(run):
    rows = lines(run / "metrics.jsonl")[1:]
    assert max(row["mismatch/max"] for row in rows) < 1e-4
    assert all(row["grad_norm"] > 0 for row in rows)
    samples = [sample for sample in lines(run / "samples.jsonl") if sample["phase"] == "train"]
    assert {sample["step"] - sample["policy_version"] for sample in samples} == {1}


def test_every_held_out_row_is_scored_once_before_and_after(run):
    samples = [sample for sample in lines(run / "samples.jsonl") if sample["phase"] == "eval"]
    for step in (0, STEPS):
        rows = [sample["row"] for sample in samples if sample["step"] == step]
        assert len(rows) == len(set(rows)) == 128


def test_what_is_saved_is_a_hugging_face_model(run):
    latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip() / "model"
    model = AutoModelForImageTextToText.from_pretrained(latest)
    assert model.config.model_type == "qwen2_5_vl"
    assert AutoProcessor.from_pretrained(latest).image_token == "<|image_pad|>"
