"""The core imports no engine; neither it nor rlcore_adapters names a device, in code or at run time."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

CORE = Path(__file__).parents[1] / "rlcore"
FILES = sorted(CORE.rglob("*.py"))
ADAPTERS = CORE.with_name("adapters")
FOREIGN = {"vllm", "ray", "torch_npu", "megatron", "sglang", "rlcore_backends", "rlcore_adapters", "backends", "adapters"}
NAMES = re.compile(r"cuda|npu(?!t)|nccl|hccl|gloo|vllm|sglang|megatron|ascend", re.IGNORECASE)  # npu(?!t): not "input"
DEVICES = re.compile(r"cuda|npu(?!t)|nccl|hccl|gloo|ascend", re.IGNORECASE)
ALLOWED = {
    "vllm_tps": "a metric's published name: MindSpeed-RL prints it whatever the engine is",
}
KEYS = re.compile(r"[\w.*]*_resource\.num_npus|[\w.]*(npu_deterministic|nccl_timeout|cudagraph_capture_sizes)")
"""Keys of other frameworks' run files, which their tables name."""


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imported(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Top-level names of absolute imports, and of importlib's with a literal name."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from ((node.lineno, arg.value.partition(".")[0]) for arg in node.args if isinstance(arg, ast.Constant))


def words(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Identifiers and strings of the code, except docstrings (bare string statements)."""
    documents = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node.lineno, node.value
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CORE)))
def test_the_core_imports_no_engine_and_no_plugin(file):
    assert [(line, name) for line, name in imported(tree(file)) if name in FOREIGN] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CORE)))
def test_the_core_names_no_device_and_no_collective(file):
    found = [(line, word) for line, word in words(tree(file)) if NAMES.search(word) and word not in ALLOWED]
    assert found == []


@pytest.mark.parametrize("file", sorted(ADAPTERS.rglob("*.py")), ids=lambda file: str(file.relative_to(ADAPTERS)))
def test_adapters_name_no_device_and_no_collective(file):
    found = [(line, word) for line, word in words(tree(file)) if DEVICES.search(word)]
    assert [(line, word) for line, word in found if file.parent.name != "configs" or not KEYS.fullmatch(word)] == []


SILENT = {
    "a query": "torch.cuda.is_available()",
    "memory": "torch.cuda.memory.empty_cache()",
    "a seed": "torch.cuda.manual_seed_all(0)",
    "a tensor": "torch.ones(1).is_cuda",
    "a move": "torch.nn.Linear(1, 1).cuda()",
}


@pytest.mark.parametrize("call", SILENT.values(), ids=SILENT)
@pytest.mark.parametrize("package", ["rlcore", "rlcore_adapters"])
def test_a_call_of_another_device_fails_in_our_code(call, package):
    with pytest.raises(AssertionError, match=r"ask torch\.get_device_module"):
        eval(call, {"torch": torch, "__name__": f"{package}.somewhere"})


def test_others_may_call_what_they_like():
    assert not eval(SILENT["a tensor"], {"torch": torch, "__name__": "vllm.somewhere"})
    eval(SILENT["a query"], {"torch": torch, "__name__": "rlcore_backends.somewhere"})


def test_the_walk_sees_what_it_is_there_for():
    body = "    'cuda in a docstring'\n    import vllm.x\n    return torch.npu.y, 'nccl', input_ids, f'{x}cuda:0'\n"
    module = ast.parse(f"def f(cuda_x):\n{body}")
    assert [name for _, name in imported(module)] == ["vllm"]
    assert sorted(word for _, word in words(module) if NAMES.search(word)) == ["cuda:0", "cuda_x", "nccl", "npu"]


def test_a_run_on_the_plain_sampler_imports_no_engine(tmp_path, tiny_llama):
    """A complete run: without an engine, none is imported."""
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from rlcore.cli.main import main\n"
        "settings = 'model: {path: ' + sys.argv[1] + '}\\ndata: {train: {name: arithmetic}, max_prompt_tokens: 64}\\n"
        "reward: [{name: math}]\\nrollout: {engine: torch, max_new_tokens: 2}\\n"
        "train: {steps: 1, prompts_per_step: 1, max_tokens_per_microbatch: 512}\\nlogging: {tensorboard: false}\\n'\n"
        "Path(sys.argv[2]).write_text(settings)\n"
        "assert main(['grpo', sys.argv[2], '--run-dir', sys.argv[3]]) == 0\n"
        "engines = {'vllm', 'ray', 'sglang', 'megatron', 'torch_npu'} & set(sys.modules)\n"
        "assert not engines, engines\n"
    )
    arguments = [str(tiny_llama), str(tmp_path / "run.yaml"), str(tmp_path / "run")]
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
