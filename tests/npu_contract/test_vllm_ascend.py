"""The engine on an Ascend device: our arguments through the real platform plugin, our names against the real worker.

vLLM is the version that vllm-ascend extends. No engine starts: that needs kernels.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import source
import torch
import vllm
import vllm_ascend
import yaml
from conftest import NPU
from rlcore_backends.vllm import engine as vllm_engine
from vllm.platforms import current_platform

from rlcore import registry
from rlcore.config.sections import LoraConfig, ModelConfig, RolloutConfig
from rlcore.errors import ConfigError
from rlcore.model import loading

ENGINES = sorted(source.ROOT.glob("backends/vllm/*.py"))
ASCEND = Path(vllm_ascend.__file__).parent


def test_the_platform_is_the_real_one():
    assert version("vllm-ascend") == vllm.__version__ == "0.23.0"
    assert type(current_platform).__module__ == "vllm_ascend.platform"
    assert (current_platform.device_type, current_platform.ray_device_key) == ("npu", next(iter(NPU().device_resources())))
    assert current_platform.device_control_env_var == "ASCEND_RT_VISIBLE_DEVICES"


class Started(Exception):
    """Raised instead of an engine start; carries the engine arguments."""


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """The configuration that vLLM and its platform build from the engine arguments of `build`."""

    def refuse(**arguments):
        raise Started(arguments)

    monkeypatch.setattr(vllm, "LLM", refuse)

    def configure(model="tiny_qwen3", lora=None, options=None, **ours):
        registry.load("models", model)(tmp_path, hidden_size=64, layers=1)
        family, backend = loading.family_of(tmp_path, ModelConfig(path=str(tmp_path))), NPU(NPU.Options(**ours))
        with pytest.raises(Started) as started:
            vllm_engine.build(
                family, tmp_path, backend, RolloutConfig(options=options or {}), torch.bfloat16, 256, 7, lora, image_embeds=True
            )
        return vllm.EngineArgs(**started.value.args[0]).create_engine_config()

    return configure


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("model", ["tiny_qwen3", "tiny_qwen2_5_vl"])
def test_our_arguments_are_a_configuration_of_the_device(configured, model, level):
    made = configured(model, engine_memory=0.4, sleep_level=level)
    assert made.device_config.device_type == "npu" and made.parallel_config.worker_cls.endswith("NPUWorker")
    assert made.cache_config.gpu_memory_utilization == 0.4 and made.model_config.enable_sleep_mode == (level > 0)
    assert made.model_config.enforce_eager and made.model_config.seed == 7 and made.model_config.max_model_len == 256
    assert made.model_config.dtype == torch.bfloat16 and made.cache_config.enable_prefix_caching


def test_additions_are_configured_too(configured):
    made = configured(lora=LoraConfig(rank=12, alpha=24))
    assert made.lora_config.max_lora_rank == 16 and made.device_config.device_type == "npu"


def test_a_wrong_engine_argument_is_named():
    with pytest.raises(ConfigError, match=r"gpu_memory_utilisation: .*did you mean 'gpu_memory_utilization'"):
        vllm_engine._refuse_unknown({"gpu_memory_utilisation": 0.5})


def test_what_the_worker_demands_of_a_wake_up_is_what_the_environment_gives(configured, monkeypatch):
    """Whole weights cannot be woken in the NZ layout; NPUWorker.wake_up reads the same configuration."""
    from vllm_ascend.ascend_config import clear_ascend_config, init_ascend_config

    made = configured(sleep_level=1)
    assert init_ascend_config(made).weight_nz_mode == 0
    clear_ascend_config()
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", "1")
    assert init_ascend_config(made).weight_nz_mode != 0
    clear_ascend_config()


def keys_read() -> set[str]:
    """additional_config keys read anywhere in vllm-ascend."""
    keys = set()
    for file in ASCEND.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
                owner, names = ast.unparse(node.func.value), node.args[:1]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("_get_config_value"):
                owner, names = "additional_config", node.args[1:2]
            elif isinstance(node, ast.Subscript):
                owner, names = ast.unparse(node.value), [node.slice]
            else:
                continue
            if owner.endswith("additional_config"):
                keys |= {name.value for name in names if isinstance(name, ast.Constant)}
    return keys


def keys_used() -> set[str]:
    """additional_config keys set in run files and by the backend."""
    files = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in source.ROOT.glob("examples/**/*.yaml")]
    options = [((file.get("rollout") or {}).get("options") or {}) for file in files if isinstance(file, dict)]
    options += [NPU(NPU.Options(sleep_level=level)).engine_options("vllm") for level in (0, 2)]
    return {key for one in options for key in one.get("additional_config") or {}}


def test_every_additional_key_is_read(configured):
    """Checked in the wheel's source, because the platform accepts unknown keys."""
    read = keys_read()
    assert len(read) > 20 and "weight_nz_mode" in read and "no_such_key" not in read
    assert configured(options={"additional_config": {"no_such_key": 1}}).additional_config["no_such_key"] == 1
    assert keys_used() <= read


@pytest.mark.parametrize("module, name", sorted({pair for file in ENGINES for pair in source.imports(file, "vllm")}))
def test_every_import_of_the_engine_is_there(module, name):
    assert hasattr(import_module(module), name)
    assert not hasattr(import_module(module), f"{name}OfNobody")


def has(kind: type, name: str) -> bool:
    """Whether it is a member, or set on `self` in the source of a base class."""
    sources = "".join(inspect.getsource(one) for one in kind.__mro__ if one.__module__.startswith("vllm"))
    return hasattr(kind, name) or re.search(rf"\bself\.{name}\b(: [^=\n]+)? = ", sources) is not None


def runner() -> type:
    from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

    return NPUModelRunner


OWNERS = {
    "self._runner": runner,
    "runner": runner,
    "self._llm": lambda: vllm.LLM,
    "self._llm.llm_engine": lambda: import_module("vllm.v1.engine.llm_engine").LLMEngine,
}


@pytest.mark.parametrize("owner", OWNERS)
def test_every_name_of_the_engine_is_there(owner):
    kind, names = OWNERS[owner](), {name for file in ENGINES for name in source.attributes(file, owner)}
    assert names
    assert {name for name in names if not has(kind, name)} == set()
    assert not has(kind, "of_nobody")


def test_the_worker_reloads_weights_layer_by_layer():
    reload = runner().reload_weights
    assert "weights_iterator" in inspect.signature(reload).parameters
    text = inspect.getsource(reload)
    assert "initialize_layerwise_reload(model)" in text and "finalize_layerwise_reload(model, self.model_config)" in text


def test_the_worker_sleeps_and_wakes_as_it_is_asked_to(monkeypatch):
    runtime = SimpleNamespace(memcpy=None)  # the only import from CANN's own Python package, which is in no wheel
    monkeypatch.setitem(sys.modules, "acl", SimpleNamespace(rt=runtime))
    monkeypatch.setitem(sys.modules, "acl.rt", runtime)
    from vllm_ascend.worker.worker import NPUWorker

    inspect.signature(NPUWorker.sleep).bind(None, level=1)
    for wake_up in (NPUWorker.wake_up, vllm.LLM.wake_up):
        inspect.signature(wake_up).bind(None, tags=["kv_cache"])
    assert has(NPUWorker, "model_runner")
    inspect.signature(vllm.LLM.sleep).bind(None, level=1)
    assert "weight_nz_mode" in inspect.getsource(NPUWorker.wake_up)


def test_heads_are_checked_by_the_devices_own_attention():
    from vllm_ascend.attention.attention_v1 import AscendAttentionBackend as Attention

    assert Attention.supports_head_size(128) and Attention.get_name() and isinstance(Attention.get_supported_head_sizes(), list)
