"""The npu backend without an npu: its Ray, HCCL and vLLM settings, and its errors for missing or wrong ones."""

from __future__ import annotations

import importlib.util
import re
import socket
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from pydantic import ValidationError
from rlcore_backends.npu import backend as npu_backend

from rlcore import registry
from rlcore.cli.main import main
from rlcore.errors import ConfigError, PluginError

NPU = registry.load("backends", "npu")
absent = pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu itself is installed here")


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    """Unset every variable that these tests check."""
    for name in [*NPU(NPU.Options(deterministic=True)).environment(), "PYTORCH_NPU_ALLOC_CONF"]:
        monkeypatch.delenv(name, raising=False)


def made(**options):
    return NPU(NPU.Options(**options))


def test_every_conflict_is_reported_at_once():
    given = {
        "VLLM_ASCEND_ENABLE_NZ": "1", "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "true", "HCCL_DETERMINISTIC": "false",
        "LCCL_DETERMINISTIC": "1", "PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:512, expandable_segments:True",
    }  # fmt: skip
    with pytest.raises(ConfigError) as error:
        made(deterministic=True, sleep_level=1).apply_environment(given)
    found = str(error.value).splitlines()[1:]
    names = ["VLLM_ASCEND_ENABLE_NZ", "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES", "HCCL_DETERMINISTIC"]
    assert [line.strip().partition("=")[0] for line in found] == [*names, "PYTORCH_NPU_ALLOC_CONF"]
    assert "HCCL_DETERMINISTIC=false, needed is true (backend.options.deterministic)" in found[2]


def test_without_their_option_the_same_settings_are_no_conflict():
    given = {"HCCL_DETERMINISTIC": "false", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    made().apply_environment(given)
    assert given["HCCL_DETERMINISTIC"] == "false"


def test_a_value_spelled_otherwise_is_no_conflict():
    given = {"HCCL_DETERMINISTIC": "TRUE"}
    made(deterministic=True).apply_environment(given)
    assert given["HCCL_DETERMINISTIC"] == "TRUE"


def test_a_device_is_one_npu_and_its_share_of_the_cores():
    assert made(cores=3).sharing(4).device_resources() == {"NPU": 1.0, "CPU": 3.0}
    assert made().sharing(10**6).device_resources() == {"NPU": 1.0, "CPU": 1.0}
    assert 1 <= made().device_resources()["CPU"] <= 8


def test_collectives_go_through_the_interface_of_the_address():
    loopback = next(
        name for name, entries in psutil.net_if_addrs().items()
        if any(entry.family == socket.AF_INET and entry.address == "127.0.0.1" for entry in entries)
    )  # fmt: skip
    assert made().network("127.0.0.1") == {"HCCL_SOCKET_IFNAME": loopback, "GLOO_SOCKET_IFNAME": loopback}
    assert made().network("192.0.2.1") == {}


def test_the_engine_is_left_its_share_of_the_memory():
    assert made(engine_memory=0.25).engine_options("vllm") == {"gpu_memory_utilization": 0.25, "enable_sleep_mode": False}
    assert made().engine_options("torch") == {}


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_engine_can_sleep_at_every_level_but_0(level):
    """Its allocator must be set up for offloadable memory at start-up."""
    assert made(sleep_level=level).engine_options("vllm")["enable_sleep_mode"] is (level > 0)


def test_a_model_is_left_alone_where_kernels_are_switched_off(tiny_llama):
    model = registry.load("families", "llama")(tiny_llama).load(tiny_llama, torch.float32)
    kinds = [type(layer) for layer in model.modules()]
    assert [type(layer) for layer in made(fused=False).fuse(model).modules()] == kinds
    with pytest.raises(ValidationError, match="fused"):
        made(fused="flash")


@absent
def test_a_missing_torch_npu_is_named_with_its_remedy():
    with pytest.raises(PluginError, match=r"torch_npu is not installed; pip install -r requirements/npu\.txt"):
        made().prepare()


@absent
@pytest.mark.parametrize(("error", "said"), [
    ("ImportError('libhccl.so: cannot open shared object file: No such file or directory')", r"finds no CANN .*set_env\.sh"),
    ("RuntimeError('Two accelerators cannot be used at the same time')", "does not import: Two accelerators"),
    ("ModuleNotFoundError('no yaml', name='yaml')", "does not import: no yaml"),
])  # fmt: skip
def test_a_broken_torch_npu_says_what_it_lacks(tmp_path, monkeypatch, error, said):
    (tmp_path / "torch_npu.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=said):
        made().prepare()


@absent
def test_a_run_on_a_machine_without_torch_npu_is_the_users_mistake(tmp_path, tiny_llama, capsys, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{path: {tiny_llama}}}\ndata: {{train: {{name: arithmetic}}}}\nreward: [{{name: math}}]\n"
        "rollout: {engine: torch}\ntrain: {steps: 1}\n"
    )
    with monkeypatch.context() as patch:
        for name in made().environment():
            patch.setenv(name, made().environment()[name])  # undo what the command leaves in the environment
        assert main(["grpo", str(file), "--backend", "npu", "--run-dir", str(tmp_path / "run")]) == 2
    assert "rlcore: backend.name npu: torch_npu is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_page_lists_the_environment_and_the_options_as_they_are():
    page = (Path(__file__).parents[3] / "docs/npu.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| (default|needed|deterministic) \|", page, re.MULTILINE)
    defaults = {name: (value, "default") for name, value in npu_backend.DEFAULTS.items()}
    needed = {name: (value, "needed") for name, (value, _) in npu_backend.NEEDED.items()}
    deterministic = {name: (value, "deterministic") for name, (value, _) in npu_backend.DETERMINISTIC.items()}
    assert {name: (value, kind) for name, value, kind in rows} == defaults | needed | deterministic
    options = page.partition("## Options")[2].partition("\n## ")[0]
    fields = {name: field.default for name, field in npu_backend.NpuOptions.model_fields.items()}
    written = re.findall(r"^\| `(\w+)` \| `?([^`|]*?)`? \|", options, re.MULTILINE)
    assert {name: yaml.safe_load(value) for name, value in written} == fields
