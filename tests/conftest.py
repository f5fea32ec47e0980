"""The tests run on the cpu backend: its environment is set before torch is imported, its patches before transformers."""

import importlib
import os
import sys
import tempfile
from pathlib import Path

import pytest

from rlcore import registry

collect_ignore = ["npu_contract"]  # make test-npu


def pytest_addoption(parser):
    parser.addoption("--bf16", choices=("1", "0"), help="run as if this processor had bf16 instructions, or had none")


def pytest_configure(config):
    """Runs before any test file is imported, in every test process; child processes inherit it."""
    if config.getoption("bf16") is not None:
        os.environ["RLCORE_CPU_BF16"] = config.getoption("bf16")


CPU = registry.load("backends", "cpu")
BACKEND = CPU(CPU.Options()).sharing(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
os.environ.update(BACKEND.environment())
CACHE = tempfile.TemporaryDirectory(prefix="rlcore-vllm-")  # no cache of an earlier vLLM
os.environ["VLLM_CACHE_ROOT"] = CACHE.name
BACKEND.prepare()
importlib.import_module("tripwire").arm()  # here: it imports torch


def pytest_collection_finish(session):
    assert "vllm" not in sys.modules, "a test file loads vLLM when it is imported; let its tests do that"


def pytest_collection_modifyitems(items):
    """vLLM changes rounding in the process that loads it: its files come last."""
    items.sort(key=lambda item: item.path.name.startswith("test_vllm_"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.vllm_was_here = "vllm" in sys.modules


def pytest_runtest_teardown(item):
    """vLLM changes rounding in the process that loads it, which would affect later tests."""
    if "vllm" in sys.modules and not item.vllm_was_here and not item.path.name.startswith("test_vllm_"):
        pytest.fail("this test loaded vLLM into the tests' process; call its file test_vllm_*.py, or run it in one of its own")


@pytest.fixture(scope="session")
def backend():
    return BACKEND


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Cache folder of this session's tiny models."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny_llama(models) -> Path:
    """The folder of a text model with 0.2 million random weights."""
    folder = models / "tiny_llama"
    registry.load("models", "tiny_llama")(folder, hidden_size=64, layers=2)
    return folder


@pytest.fixture(scope="session")
def tiny_vision(models) -> Path:
    """The folder of a vision-language model with 0.7 million random weights."""
    folder = models / "tiny_vision"
    registry.load("models", "tiny_qwen2_5_vl")(folder, layers=2, vision_layers=2)
    return folder


@pytest.fixture(scope="session")
def cluster():
    """Ray on this machine, with room for more workers than it has cores."""
    import ray

    ray.init("local", num_cpus=12, include_dashboard=False, logging_level="ERROR", configure_logging=False)
    yield
    ray.shutdown()
