"""Every call of the npu backend, and the core's uses of its device module, once on the real torch_npu.

Wiring only: names, arguments, dtypes, devices, copies. The stub kernels compute nothing, so their outputs are not checked.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import source
import torch
from conftest import BACKEND, RAN, note
from rlcore_backends.common import node_address

from rlcore import registry
from rlcore.checkpoint.state import load_generator, save_generator
from rlcore.distributed.snapshot import Snapshot
from rlcore.model import loading
from rlcore.model.precision import WorkingCopy
from rlcore.runtime import memory
from rlcore.runtime.memory import OffloadedTensors
from rlcore.types import Packed, Segment

HERE = BACKEND.device(0)
ROTARY = {"aclnnRotaryPositionEmbedding", "aclnnRotaryPositionEmbeddingGrad"}
KERNELS = ROTARY | {
    "aclnnFlashAttentionVarLenScore", "aclnnFlashAttentionUnpaddingScoreGrad", "aclnnRmsNorm", "aclnnRmsNormGrad",
    "aclnnSwiGlu", "aclnnSwiGluGrad", "aclnnApplyAdamW",
}  # fmt: skip
NOT_HERE = {
    "collectives": "ranks.py", "group": "ranks.py", "engine_options": "test_vllm_ascend.py",
    "device_resources": "Ray's", "sharing": "no device's", "network": "no device's", "default_precision": "no device's",
    "_remedy": "a torch_npu that does not import", "conflicts": "before torch", "_needed": "before torch",
    "environment": "before torch", "engine_memory": "no device's", "prepare_host": "no device's",
}  # fmt: skip


@pytest.fixture(autouse=True)
def noted():
    sys.setprofile(note)
    yield
    sys.setprofile(None)


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Names of CANN functions called since the last time."""
    file = tmp_path / "calls"
    file.touch()
    monkeypatch.setenv("FAKE_CANN_CALLS", str(file))

    def read():
        torch.npu.synchronize()
        return set(file.read_text().split())

    return read


def test_the_device_is_torchs_accelerator():
    assert torch.accelerator.current_accelerator().type == "npu" and torch.get_device_module(HERE) is torch.npu
    assert BACKEND.device(1) == torch.device("npu:1") and torch.npu.device_count() == 2
    assert torch.npu.is_available() and not torch.cuda.is_available()
    torch.accelerator.synchronize()
    assert torch.arange(6.0).to(HERE).view(2, 3)[1].cpu().tolist() == [3, 4, 5], "copies and views are real"
    with pytest.raises(RuntimeError):
        torch.ones(2).to(HERE) + torch.ones(2)


def test_deterministic_reaches_the_device(calls):
    assert torch.are_deterministic_algorithms_enabled()
    torch.ones(4, 4).to(HERE) @ torch.ones(4, 4).to(HERE)
    assert "aclrtCtxSetSysParamOpt" in calls()


def test_a_saved_generator_is_the_same_again(tmp_path):
    torch.manual_seed(3)
    save_generator(HERE, snapshot := Snapshot(tmp_path))
    snapshot.write()
    saved = json.loads((tmp_path / "generator.json").read_text())
    assert saved["device"] == "npu"
    state = torch.npu.get_rng_state(HERE)
    torch.manual_seed(4)
    assert not torch.equal(torch.npu.get_rng_state(HERE), state)
    load_generator(HERE, tmp_path)
    assert torch.equal(torch.npu.get_rng_state(HERE), state)


def test_memory_is_counted():
    before = memory.memory(HERE)["memory/peak_device_gib"]
    held = torch.empty(2**28, dtype=torch.uint8, device=HERE)
    assert memory.memory(HERE)["memory/peak_device_gib"] >= before + held.nbytes / 2**30 - 0.01


def test_the_allocators_own_error_is_a_shortage():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**37, dtype=torch.uint8, device=HERE)
    assert BACKEND.shortage(refused.value) == "device", refused.value
    assert BACKEND.shortage(RuntimeError("a kernel failed")) is None


def test_what_is_parked_leaves_and_comes_back():
    tensor = torch.arange(2.0**20).to(HERE)
    held = torch.npu.memory_allocated(HERE)
    offloaded = OffloadedTensors(lambda: [tensor])
    offloaded.pause()
    assert all(copy.is_pinned() for _, _, copy in offloaded._away)
    assert offloaded.device_bytes() == 0 and torch.npu.memory_allocated(HERE) <= held - tensor.nbytes
    offloaded.resume()
    assert torch.equal(tensor.cpu(), torch.arange(2.0**20))


@pytest.mark.parametrize("kind", ["tiny_qwen3", "tiny_qwen2_5_vl"])
def test_a_step_of_a_model_goes_through_the_kernels(kind, tmp_path, calls):
    registry.load("models", kind)(tmp_path, hidden_size=64, layers=1)
    family = registry.load("families", loading.model_type(tmp_path))(tmp_path)
    model = BACKEND.fuse(family.load(tmp_path, torch.float32).to(HERE))
    positions = torch.cat([torch.arange(length) + first for length, first in ((5, 0), (3, 5), (3, 5))])
    places = positions.expand(3, -1) if hasattr(model.model, "language_model") else positions
    row = Packed(torch.arange(11), places, (Segment(0, 5, (3, 3)),), *[torch.arange(3)] * 3, ["a"], [None])
    with WorkingCopy(model, torch.bfloat16)():
        hidden = family.hidden(model, row)
        assert hidden.device == HERE and hidden.shape == (11, 64) and hidden.dtype == torch.bfloat16
        hidden.float().sum().backward()
    moved = [weight for weight in model.parameters() if weight.grad is not None]
    torch.nn.utils.clip_grad_norm_(moved, 1.0)
    BACKEND.adamw([{"params": moved}], lr=1e-3).step()
    asked = calls()
    wanted = KERNELS if kind != "tiny_qwen2_5_vl" else KERNELS - ROTARY  # its rotary embedding over three axes is not replaced
    assert [kernel for kernel in wanted if not any(name.startswith(kernel) for name in asked)] == []
    assert wanted == KERNELS or not any(name.startswith(tuple(ROTARY)) for name in asked)


def test_two_processes_meet_through_hccl(tmp_path):
    """In the default group, a second group, and a model sharded over both ranks. Host-memory sums are real."""
    script, endpoint = Path(__file__).with_name("ranks.py"), node_address.free_endpoint("127.0.0.1")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(tmp_path / "store"), endpoint],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=180) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    for number, (said, _) in enumerate(outputs):
        assert json.loads(said.splitlines()[-1]) == {
            "in host memory": [3, 3], "group": "ProcessGroupHCCL", "default": "ProcessGroupHCCL", "weight": f"npu:{number}",
        }  # fmt: skip


def test_no_function_of_the_backend_was_left_out():
    """Functions run in this process since the backend was prepared."""
    files = [file for file in source.NPU_FILES if file.name != "doctor.py"]
    trees = {file.name: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    functions = {
        (file, node.name) for file, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    }
    assert {name for _, name in functions - RAN} == set(NOT_HERE)
