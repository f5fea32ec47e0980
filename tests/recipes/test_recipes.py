"""Every recipe's tiny variant, from the published files to a reloaded model: data, training, evaluation, export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from real_rows import shared
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlcore.config import loader

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "recipes"
COMMANDS = {  # by recipe: data set, its published rows, command
    "qwen2_5_vl_7b_geo3k_grpo": ("geo3k", "geo3k", "grpo"),
    "qwen3_8b_math_grpo": ("math-lighteval", "math", "grpo"),
    "qwen2_5_vl_3b_geo3k_grpo_npu": ("geo3k", "geo3k", "grpo"),
    "qwen2_5_vl_3b_robo2vlm_sft": ("robo2vlm", "robo2vlm", "sft"),
}
SIZES = {  # sections and keys in which a tiny variant may differ from its recipe
    "model.path", "model.options", "model.precision", "backend", "data", "vision.min_pixels", "vision.max_pixels", "sft",
    "rollout.max_new_tokens", "rollout.options", "algorithm.group_size", "optimizer.lr", "train", "evaluation", "placement",
    "sharding.replicas",
}  # fmt: skip


COMMAND_LINES = """
import json, sys
from rlcore.cli.main import main
sys.exit(next((status for arguments in json.loads(sys.argv[1]) if (status := main(arguments))), 0))
"""


def rlcore(*commands, folder):
    """Run command lines until one fails, in one process: importing the engine takes longer than using it here."""
    lines = json.dumps([[str(argument) for argument in command] for command in commands])
    program = [sys.executable, "-c", COMMAND_LINES, lines]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stdout + done.stderr


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_recipe_has_a_tiny_variant_which_is_the_same_but_for_its_size():
    found = {path.stem for path in RECIPES.glob("*.yaml")}
    assert found == {name + suffix for name in COMMANDS for suffix in ("", "_tiny")}
    for name in COMMANDS:
        recipe, tiny = (flat(loader.load(RECIPES / f"{name}{suffix}.yaml").model_dump()) for suffix in ("", "_tiny"))
        differing = {key for key in recipe.keys() | tiny.keys() if recipe.get(key) != tiny.get(key)}
        assert not [key for key in differing if not any(f"{key}.".startswith(f"{size}.") for size in SIZES)]


def flat(values, prefix=""):
    if not isinstance(values, dict):
        return {prefix: values}
    return {name: one for key, value in values.items() for name, one in flat(value, f"{prefix}.{key}".lstrip(".")).items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_recipe_runs_from_published_files_to_a_model_that_answers_the_same(name, tmp_path):
    prepared, published, command = COMMANDS[name]
    file, run, rows = RECIPES / f"{name}_tiny.yaml", tmp_path / "run", RECIPES / "rows" / published
    short = ["sft.steps=6", "train.save_every=3", "evaluation.every=3"] if command == "sft" else ["train.steps=1"]
    exact, here = "model.precision=fp32", "placement={kind: local}"
    rlcore(
        ("data", prepared, "--input", rows, "--output", f"data/{published}"),
        (command, file, *short, exact, "--run-dir", run),
        ("eval", file, exact, here, "--model", run, "--run-dir", tmp_path / "eval"),
        folder=tmp_path,
    )
    steps = sorted((run / "checkpoints").glob("step_*"))
    samples, end = lines(run / "samples.jsonl"), lines(run / "metrics.jsonl")[-1]["step"]
    last = [one for one in samples if one["phase"] == "eval" and one["step"] == end]
    again = lines(tmp_path / "eval" / "samples.jsonl")
    assert len({one["row"] for one in again}) == 16, "every held-out row"
    assert [(one["row"], one["response"], one["score"]) for one in again] == [
        (one["row"], one["response"], one["score"]) for one in last
    ]
    kind = AutoModelForImageTextToText if "vl" in name else AutoModelForCausalLM
    _, report = kind.from_pretrained(steps[-1] / "model", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("name", COMMANDS)
def test_real_rows_go_through_a_recipe(name, tmp_path):
    """With the plain sampler: rows of the real size are slow for an engine that starts for them alone."""
    prepared, published, command = COMMANDS[name]
    if published == "robo2vlm":
        pytest.skip("no published rows of Robo2VLM-1 are on this machine")
    rows = shared("data", {"geo3k": "geometry3k", "math": "MATH-lighteval"}[published])
    sizes = [
        "data.max_prompt_tokens=1024", "train.max_tokens_per_microbatch=2048", "train.steps=1", "train.prompts_per_step=2",
        "train.minibatches_per_step=1", "algorithm.group_size=2", "rollout.engine=torch", "rollout.max_new_tokens=8",
        "rollout.options={}", "sft=", "evaluation=", "placement={kind: local}", "data.eval=", "model.options.context=2048",
    ]  # fmt: skip
    rlcore(
        ("data", prepared, "--input", rows, "--output", f"data/{published}"),
        (command, RECIPES / f"{name}_tiny.yaml", *sizes, "--run-dir", tmp_path / "run"),
        folder=tmp_path,
    )
    assert len(lines(tmp_path / "run" / "samples.jsonl")) == 4
