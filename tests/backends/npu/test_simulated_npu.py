"""Runs on the CPU compared with runs on a simulated Ascend device, the latter each in its own process."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from weight_models import tensors

from rlcore import registry
from rlcore.cli.main import main

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu itself is installed here")
FOLDER = Path(__file__).parents[2] / "simulated_npu"
STEPS, LAYERS = 2, 2
OPTIMIZER_STEPS = (2 + STEPS) + (2 + 1) + 1 + 1  # of `report`: a run, the first step of another, two resumed runs
AWAY = "placement.offload=[parameters, optimizer, reference, engine]"
POOLS = "{train: {roles: [actor, reference], devices: 2}, sample: {roles: [rollout]}}"
APART = f"placement={{kind: ray, offload: [parameters, optimizer, reference], pools: {POOLS}}}"
ALLOWED = {"rel": 1e-4, "abs": 2e-5}  # different kernels round differently


def graded(response, answer, fields):
    return len(set(response)) / 10


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Folder of a run file: a warm start, then steps with a reference, two micro-batches and a checkpoint each."""
    base = tmp_path_factory.mktemp("devices")
    registry.load("models", "tiny_qwen3")(base / "model", hidden_size=64, layers=LAYERS)
    settings = {
        "model": {"path": str(base / "model"), "precision": "fp32"},
        "data": {"train": {"name": "arithmetic", "options": {"count": 16, "max_value": 9}}, "max_prompt_tokens": 64},
        "sft": {"steps": 2, "rows_per_step": 2, "optimizer": {"lr": 1e-3}},
        "rollout": {"engine": "torch", "max_new_tokens": 5}, "reward": [{"name": "test_simulated_npu.graded"}],
        "algorithm": {"group_size": 2, "kl_coef": 0.1}, "optimizer": {"lr": 1e-3},
        "train": {
            "steps": STEPS, "prompts_per_step": 2, "minibatches_per_step": 1, "max_tokens_per_microbatch": 72, "save_every": 1,
        },
        "logging": {"tensorboard": False, "samples_on_console": 0},
    }  # fmt: skip
    (base / "run.yaml").write_text(yaml.safe_dump(settings))
    return base


def command(base, name, *overrides):
    return ["grpo", str(base / "run.yaml"), "--run-dir", str(base / name), *overrides]


def halfway(source, name) -> Path:
    """A copy of a run folder that resumes after its first step."""
    shutil.copytree(source, source.parent / name)
    (source.parent / name / "checkpoints" / "latest").write_text("step_000001")
    return source.parent / name


def on_npu(program, devices):
    """Run commands in a process that imports the simulated torch_npu."""
    paths = os.pathsep.join(map(str, [FOLDER, FOLDER.parent, Path(__file__).parent]))
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR", "VLLM_CACHE_ROOT")}
    environment = {**kept, "PYTHONPATH": paths, "SIMULATED_NPUS": str(devices), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result


def run_here(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        assert main([*arguments, "backend.options.threads=1"]) == 0


@pytest.fixture(scope="module")
def cpu(base) -> Path:
    run_here(command(base, "cpu"))
    return base / "cpu"


@pytest.fixture(scope="module")
def report(base, cpu):
    """Report of a session on the device: a run, the same resumed halfway, and one begun on the CPU."""
    halfway(cpu, "from_cpu")
    npu, away = "--backend=npu", AWAY
    whole = [command(base, "npu", npu, away), command(base, "first", npu, away, "train.steps=1")]
    rest = [[*command(base, name, npu, away), "--resume"] for name in ("first", "from_cpu")]
    (base / "commands.json").write_text(json.dumps([*whole, *rest]))
    result = on_npu([str(FOLDER / "session.py"), str(base / "commands.json"), str(base / "report.json")], devices=1)
    said = json.loads((base / "report.json").read_text())
    assert said["statuses"] == [0] * 4, result.stderr
    return {**said, "output": result.stdout}


def rows(file):
    """Rows of metrics.jsonl without time and memory metrics."""
    rates = ("e2e_tps", "update_tps", "vllm_tps", "decode_tps", "tps_")
    skipped = ("timing/", "memory/", "sync/", "placement/bytes", "data/staleness", *rates)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(skipped)} for line in lines]


def assert_alike(one, other):
    """Compare all step metrics, samples, and final weights and moments."""
    for name in ("sft/metrics.jsonl", "metrics.jsonl"):
        assert len(rows(one / name)) == STEPS
        for ours, theirs in zip(rows(one / name), rows(other / name), strict=True):
            assert ours == pytest.approx(theirs, **ALLOWED)
    texts = [[json.loads(line)["response"] for line in (run / "samples.jsonl").open()] for run in (one, other)]
    assert texts[0] == texts[1]
    assert_weights_alike(one, other)


def assert_weights_alike(one, other):
    for part, close in (("model", 1e-4), (".", 1e-5)):
        ours, theirs = (tensors(run / "checkpoints" / f"step_{STEPS:06d}" / part) for run in (one, other))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert (tensor - theirs[name]).abs().max() <= close, (part, name)


def test_the_device_gives_the_processors_numbers(cpu, base, report):
    assert_alike(base / "npu", cpu)
    assert all(row["grad_norm"] > 0 for row in rows(cpu / "metrics.jsonl"))
    assert rows(cpu / "metrics.jsonl")[-1]["actor/kl_loss"] > 0, "the reference is not the policy"


def test_a_run_that_stopped_on_the_device_is_the_same_run(base, report):
    for name in ("samples.jsonl", *(f"checkpoints/step_{STEPS:06d}/{file}" for file in (
        "model/model.safetensors", "optimizer.safetensors", "state.json", "generator.json"
    ))):  # fmt: skip
        assert (base / "first" / name).read_bytes() == (base / "npu" / name).read_bytes(), name
    assert rows(base / "first" / "metrics.jsonl") == rows(base / "npu" / "metrics.jsonl")


def test_what_one_device_saved_goes_on_on_the_other(cpu, base, report):
    assert_weights_alike(base / "from_cpu", cpu)
    halfway(base / "npu", "from_npu")
    run_here([*command(base, "from_npu"), "--resume"])
    assert_weights_alike(base / "from_npu", cpu)


def test_the_work_is_done_on_the_device(report):
    """Every matmul, attention and optimizer step; layers run on the device's own kernels."""
    assert report["processor"] == {}
    ran = report["device"]
    assert sum(ran.values()) > 1000 and ran["aten::mm.out"] > 100 and ran["aten::bmm.out"] > 100
    assert ran["aten::_fused_adamw_"] == 2 * OPTIMIZER_STEPS, "one call for matrices, one for vectors"
    attended, units = ran["npu::npu_fusion_attention"], ran["npu::npu_swiglu"]
    assert attended == units and ran["npu::npu_rotary_mul"] == 2 * units, "queries and keys are rotated each by itself"
    assert attended // LAYERS >= OPTIMIZER_STEPS + STEPS, "every update, and the reference of every step"
    assert ran["npu::npu_rms_norm"] == attended * 4 + attended // LAYERS, "two a layer, queries' and keys', the last"


def test_the_simulated_device_is_what_it_says(report):
    assert report["checks"] == 0, report["output"]


def test_what_every_backend_must_do_holds_of_the_device(tmp_path):
    """Kernels and models in bf16 too, including a vision tower; a checkpoint moves to the CPU and back."""
    only = [f"--only={section}" for section in ("operators", "numbers", "ranks")]
    page = ["--report", str(tmp_path / "report.md"), "backend.options.cores=1"]
    said = on_npu(["-m", "rlcore", "check", "--backend=npu", *only, *page], devices=1).stdout
    assert "fused layers, bf16" in said and "vision, bf16: gradient norm" in said
    assert re.search(r"^35 passed, 0 failed, 1 skipped", said, re.MULTILINE), said


def test_two_devices_and_an_engine_on_a_third_are_one(cpu, base):
    """FSDP over two devices: gradients reduced and weights sent by hccl."""
    program = ["-m", "rlcore", *command(base, "apart", "--backend=npu", "backend.options.cores=1", APART)]
    on_npu(program, devices=3)
    assert_alike(base / "apart", cpu)


def test_collectives_of_the_device_are_exact(tmp_path):
    """Means are not sums; reductions that hccl lacks are refused. Offloaded tensors are sharded in host memory."""
    with ThreadPoolExecutor() as pool:
        ranks = [[str(FOLDER / "ranks.py"), str(rank), str(tmp_path / "store")] for rank in range(2)]
        first, _ = pool.map(lambda program: on_npu(program, devices=1), ranks)
    assert json.loads(first.stdout) == {
        "SUM": [3, 6], "AVG": [1.5, 3], "MAX": [2, 4], "scattered SUM": [3], "scattered AVG": [1.5],
        "BAND": "hccl has no bitwise reductions", "in host memory": [3, 6],
        "dealt to host memory": ["cpu", 0, 1],
    }  # fmt: skip
