"""Every operator the npu path dispatches and every torch_npu name the backend uses exists in the real wheel, as used.

Two wheels: the one that runs under this torch, and the pinned one, whose operators and their schemas are read from its library.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import source
import torch
import torch_npu
import yaml
from rlcore_backends.npu import backend as npu_backend

from rlcore import registry

PINNED = source.ROOT / ".venv-npu/pinned/torch_npu"
SIMULATED = source.ROOT / "tests/simulated_npu"
ABSENT = {"aten::linalg_eig", "aten::cummax"}  # in torch but not in torch_npu, which falls back to the CPU
USES = source.of_torch_npu()
CALLS = [use for use in USES if use.keywords is not None]
INSTEAD = {"aten::_copy_from": "aten::copy_", "aten::index.Tensor_out": "aten::index.Tensor"}  # name torch_npu gets


@pytest.fixture(scope="module")
def sent(tmp_path_factory) -> set[str]:
    """Operators of a run on the simulated device: warm start, GRPO with a reference, offloading."""
    folder = tmp_path_factory.mktemp("run")
    python = source.ROOT / ".venv/bin/python"
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ},
        "PYTHONPATH": f"{SIMULATED}{os.pathsep}{SIMULATED.parent}", "SIMULATED_NPUS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    registry.load("models", "tiny_qwen3")(folder / "model", hidden_size=64, layers=2)
    settings = {
        "model": {"path": str(folder / "model")}, "rollout": {"engine": "torch", "max_new_tokens": 4},
        "data": {"train": {"name": "arithmetic", "options": {"count": 8, "max_value": 9}}, "max_prompt_tokens": 64},
        "sft": {"steps": 1, "rows_per_step": 2}, "reward": [{"name": "math"}], "algorithm": {"group_size": 2, "kl_coef": 0.1},
        "train": {"steps": 1, "prompts_per_step": 2, "minibatches_per_step": 2, "max_tokens_per_microbatch": 72},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    away = "placement.offload=[parameters, optimizer, reference, engine]"
    command = ["grpo", str(folder / "run.yaml"), "--run-dir", str(folder / "run"), "--backend=npu", away]
    (folder / "commands.json").write_text(json.dumps([command]))
    session = [python, SIMULATED / "session.py", folder / "commands.json", folder / "report.json"]
    done = subprocess.run(session, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((folder / "report.json").read_text())
    assert report["statuses"] == [0]
    return {INSTEAD.get(name, name) for name in report["device"]}


@pytest.fixture(scope="module")
def library() -> bytes:
    return (PINNED / "lib/libtorch_npu.so").read_bytes()


def has_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1")


def named(library: bytes, name: str) -> bool:
    """Whether the library contains the operator's name as a whole string, as a kernel registration does."""
    return b"\0" + name.partition("::")[2].encode() + b"\0" in library


def test_every_operator_of_a_run_has_a_kernel(sent):
    assert len(sent) > 50 and {"aten::_fused_adamw_", "npu::npu_rms_norm"} <= sent
    assert {name for name in sent if not has_kernel(name)} == set()
    assert not any(has_kernel(name) for name in ABSENT)


def test_the_pinned_wheel_names_every_operator_of_a_run(sent, library):
    assert {name for name in sent if not named(library, name)} == set()
    assert not any(named(library, name) for name in ABSENT)


def find(name: str):
    """The object of that name; AttributeError if there is none."""
    first, *rest = name.split(".")
    found = {"torch_npu": torch_npu, "torch": torch}[first]
    for part in rest:
        found = getattr(found, part)
    return found


def parameters(name: str, text: str | None = None) -> list[inspect.Parameter] | None:
    """Parameters from an operator's schema (or `text`) or a function's signature; None if neither is available."""
    operator = name.rpartition(".")[2]
    if text is not None or (name == f"torch_npu.{operator}" and hasattr(torch.ops.npu, operator)):
        schema = torch._C.parse_schema(text) if text else getattr(torch.ops.npu, operator).default._schema
        kinds = {False: inspect.Parameter.POSITIONAL_OR_KEYWORD, True: inspect.Parameter.KEYWORD_ONLY}
        defaults = {True: None, False: inspect.Parameter.empty}
        return [
            inspect.Parameter(one.name, kinds[one.kwarg_only], default=defaults[one.has_default_value()])
            for one in schema.arguments
        ]
    try:
        return list(inspect.signature(find(name)).parameters.values())
    except ValueError:  # written in C++: test_wiring calls it
        return None


def fits(use: source.Use, known: list[inspect.Parameter]) -> bool:
    try:
        inspect.Signature(known).bind(*range(use.positional), **dict.fromkeys(use.keywords - {"**"}))
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("name", sorted({use.name for use in USES}))
def test_every_name_is_in_the_wheel(name):
    find(name)
    with pytest.raises(AttributeError):
        find(f"{name}_of_nobody")


@pytest.mark.parametrize("use", CALLS, ids=lambda use: f"{use.where}:{use.name}")
def test_every_call_fits_what_is_called(use):
    known = parameters(use.name)
    if known is None:
        assert "torch_npu._C." in use.name
        return
    assert fits(use, known)
    assert not fits(source.Use(use.name, use.where, use.positional, use.keywords | {"of_nobody"}), known)


OPERATORS = [use for use in CALLS if use.name.startswith("torch_npu.npu_")]


@pytest.mark.parametrize("use", OPERATORS, ids=lambda use: use.name)
def test_every_operator_fits_the_pinned_wheel(use, library):
    operator = use.name.rpartition(".")[2].encode()
    schemas = re.findall(rb"\0(" + operator + rb"\([^\0]*\) -> [^\0]+)\0", library)
    assert schemas, "the pinned torch_npu has no such operator"
    assert all(fits(use, parameters(use.name, f"npu::{schema.decode()}")) for schema in schemas)


def test_the_backend_uses_operators():
    assert {"npu_fusion_attention", "npu_rms_norm"} <= {use.name.rpartition(".")[2] for use in OPERATORS}


@pytest.mark.parametrize("name", sorted(source.of_device_modules()))
def test_what_the_core_asks_of_a_device_module_is_there(name):
    assert callable(getattr(torch.npu, name))
    assert re.search(rf"\bdef {name}\(|\b{name}\b", (PINNED / "npu/__init__.py").read_text())


ELSEWHERE = {
    "HCCL_HOST_SOCKET_PORT_RANGE": "CANN", "HCCL_NPU_SOCKET_PORT_RANGE": "CANN", "CLOSE_MATMUL_K_SHIFT": "CANN",
    "ATB_MATMUL_SHUFFLE_K_ENABLE": "NNAL", "ATB_LLM_LCOC_ENABLE": "NNAL",
}  # fmt: skip


def test_every_environment_variable_is_read_by_what_is_installed_or_listed_here():
    """Listed ones are only documented: nothing in these wheels reads them."""
    names = {*npu_backend.DEFAULTS, *npu_backend.NEEDED, *npu_backend.DETERMINISTIC, npu_backend.ALLOCATOR}
    texts = b"\0".join(file.read_bytes() for file in readers())
    assert {name for name in names if not re.search(rb"\b" + name.encode() + rb"\b", texts)} == set(ELSEWHERE)
    assert b"NO_SUCH_VARIABLE" not in texts


def readers() -> list[Path]:
    """Files of the packages that read the variables."""
    packages = ("vllm", "vllm_ascend", "ray", "tokenizers", "torch")
    folders = {name: Path(find_spec(name).origin).parent for name in packages}
    python = [file for name in ("vllm", "vllm_ascend") for file in folders[name].rglob("*.py")]
    one_by_one = [folders["torch"] / "__init__.py", folders["ray"] / "_private/accelerators/npu.py"]
    compiled = [*folders["tokenizers"].glob("*.so"), PINNED / "lib/libtorch_npu.so"]
    return [*python, *one_by_one, *compiled, *PINNED.rglob("*.py")]
