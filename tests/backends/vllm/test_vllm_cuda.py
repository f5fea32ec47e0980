"""The cuda plugin against the names and signatures of the pinned torch and vLLM. No GPU is used."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from rlcore_backends.cuda import backend as cuda_backend
from rlcore_backends.vllm import engine as vllm_engine
from rlcore_backends.vllm import lora as vllm_lora
from rlcore_backends.vllm.rollout import VllmRollout

from rlcore.cli.main import main
from rlcore.config.sections import LoraConfig
from rlcore.model import attention
from rlcore.model.attention import ragged
from rlcore.types import Sampling, Segment

vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@vllm
def test_vllm_has_every_engine_argument_that_is_set(tmp_path, monkeypatch):
    from vllm import EngineArgs

    monkeypatch.setattr(vllm_engine, "distributed", SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")  # not this process's from now on
    (tmp_path / "config.json").write_text('{"vision_config": {}}')
    given = {
        **vllm_engine.common_arguments(tmp_path, torch.bfloat16, 64, 0),
        **vllm_engine.image_arguments(tmp_path, {"size": {}}, True),
        **cuda_backend.CudaBackend().engine_options("vllm"),
        **vllm_engine._one_of_many(1), **vllm_lora.engine_arguments(LoraConfig()),
    }  # fmt: skip
    assert len(given) > 15 and given.keys() <= {field.name for field in dataclasses.fields(EngineArgs)}


@vllm
def test_vllm_reads_every_variable_of_its_own_that_is_set():
    from vllm import envs

    own = {name for name in cuda_backend.CudaBackend().environment() if name.startswith("VLLM_")}
    assert own and own <= envs.environment_variables.keys()


@vllm
def test_vllm_has_every_method_that_is_called_as_it_is_called():
    from vllm import LLM, SamplingParams
    from vllm.config import ModelConfig, set_current_vllm_config
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    for method, given in (
        (LLM.sleep, {"level": 2}), (LLM.wake_up, {"tags": ["weights"]}), (LLM.reset_prefix_cache, {}),
        (LLMEngine.has_unfinished_requests, {}), (LLMEngine.step, {}), (LLMEngine.reset_encoder_cache, {}),
        (LLMEngine.abort_request, {"request_ids": ["0"]}),
    ):  # fmt: skip
        inspect.signature(method).bind(None, **given)
    inspect.signature(LLMEngine.add_request).bind(None, "0", {}, None, lora_request=None)
    inspect.signature(LLMEngine.add_lora).bind(None, None)
    inspect.signature(LoRARequest).bind("policy", 1, "", load_inplace=True)
    inspect.signature(set_current_vllm_config).bind(None)
    asked = VllmRollout._parameters(SimpleNamespace(_family=SimpleNamespace(stop_token_ids={2})), Sampling(2, 4))
    assert isinstance(asked, SamplingParams) and asked.n == 2
    assert "enable_sleep_mode" in {field.name for field in dataclasses.fields(ModelConfig)}
    assert "self.model_executor =" in inspect.getsource(LLMEngine) and "self.sleeping_tags" in inspect.getsource(Executor)


@vllm
@pytest.mark.parametrize("module", ["vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"])
def test_both_model_runners_of_vllm_for_gpus_have_what_is_used(module):
    """The second runner is used where Triton is installed."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    runner = importlib.import_module(module).GPUModelRunner
    inspect.signature(runner.get_model).bind(None)
    inspect.signature(runner.reload_weights).bind(None, weights_iterator=iter(()))
    source = inspect.getsource(runner)
    assert "self.kv_caches" in source and "self.model_config =" in source
    assert issubclass(runner, LoRAModelRunnerMixin) and "self.lora_manager =" in inspect.getsource(LoRAModelRunnerMixin)


@vllm
def test_memory_wakes_by_the_tags_that_it_was_taken_with():
    from vllm.v1.executor.abstract import SLEEP_TAGS
    from vllm.v1.worker.gpu_worker import Worker

    assert {"weights", "kv_cache"} == SLEEP_TAGS
    source = inspect.getsource(Worker)
    assert 'tag="weights"' in source and 'tag="kv_cache"' in source
    assert "model.named_buffers()" in inspect.getsource(Worker.sleep), "which nobody sends after the second level"
    assert "named_buffers()" in inspect.getsource(Worker.wake_up)


@vllm
def test_vllm_has_no_expandable_segments_around_memory_that_sleeps_and_keeps_the_rest(monkeypatch):
    """So the trainer may use expandable segments."""
    from vllm.device_allocator import cumem

    written = []
    monkeypatch.setattr(cumem, "set_alloc_conf", written.append)
    monkeypatch.setattr(cumem, "use_memory_pool_with_allocator", lambda *_: contextlib.nullcontext((None, None)))
    monkeypatch.setattr(cumem.CuMemAllocator, "_trim", lambda *_: None)
    ours = cuda_backend.CudaBackend().environment()["PYTORCH_ALLOC_CONF"]
    for own in (ours, "max_split_size_mb:64,expandable_segments:True"):
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", own)
        with cumem.CuMemAllocator().use_memory_pool("weights"):
            assert written.pop() == own.replace("True", "False")
        assert written.pop() == own and not written


class Loaded(torch.nn.Module):
    """A model that records the weights loaded into it."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def load_weights(self, weights):
        self.told.extend((name, tensor.tolist()) for name, tensor in weights)


@pytest.fixture
def told(monkeypatch):
    """The calls vLLM makes on a model during a weight update, in order."""
    from vllm.model_executor.model_loader import reload
    from vllm.model_executor.model_loader.reload import inplace

    told = []
    for place in (reload, inplace):
        monkeypatch.setattr(place, "initialize_layerwise_reload", lambda model: told.append("begin"))
        monkeypatch.setattr(place, "finalize_layerwise_reload", lambda model, config: told.append("end"))
    return told


def transferred(name, model, monkeypatch):
    """Send a weight through one of vLLM's transfer engines without a peer."""
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine

    sent = torch.tensor([1.0, 2.0])
    config = SimpleNamespace(parallel_config=None, model_config=None)
    kind = {"ipc": ipc_engine.IPCWeightTransferEngine, "nccl": nccl_engine.NCCLWeightTransferEngine}[name]
    engine = kind(None, config, torch.device("cpu", 0), model)
    update = {"names": ["layer.weight"], "dtype_names": ["float32"], "shapes": [[2]]}
    if name == "ipc":
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="this"))
        monkeypatch.setattr(ipc_engine, "rebuild_cuda_tensor", lambda *_: sent)
        update["ipc_handles"] = [{"this": (None,) * 8}]
    else:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        engine.model_update_group = SimpleNamespace(broadcast=lambda weight, src, stream: weight.copy_(sent))
        engine.packed = False
    engine.start_weight_update()
    engine.receive_weights(engine.parse_update_info(update))
    engine.finish_weight_update()


@vllm
@pytest.mark.parametrize("engine", ["ipc", "nccl"])
def test_vllms_transfer_engines_end_where_weights_are_handed_over_by_reference(told, engine, monkeypatch):
    from vllm.model_executor.model_loader.reload import inplace

    transferred(engine, Loaded(told), monkeypatch)
    through, told[:] = list(told), []
    config = SimpleNamespace(model_config=SimpleNamespace(quantization=None), load_config=None, lora_config=None)
    inplace.reload_weights(config, Loaded(told), iter([("layer.weight", torch.tensor([1.0, 2.0]))]), None, True)
    assert through == told == ["begin", ("layer.weight", [1.0, 2.0]), "end"]


@vllm
def test_both_model_runners_reload_with_that_function():
    from vllm.model_executor.model_loader.reload import inplace
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.gpu import model_runner

    assert gpu_model_runner.reload_weights is model_runner.reload_weights is inplace.reload_weights
    for module in (gpu_model_runner, model_runner):
        assert "reload_weights(" in inspect.getsource(module.GPUModelRunner.reload_weights)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_engine_can_sleep_at_every_level_but_0(level):
    backend = cuda_backend.CudaBackend(cuda_backend.CudaOptions(sleep_level=level))
    assert backend.engine_options("vllm")["enable_sleep_mode"] is (level > 0)


def test_the_attention_kernel_is_called_as_torch_declares_it(monkeypatch):
    """Torch checks the arguments; the kernel does not run."""
    from torch.nn.attention import varlen

    asked = {}

    def kernel(query, key, value, *arguments):
        asked["kernel"] = (query.shape, key.shape, arguments)
        return torch.empty_like(query), torch.empty(0), torch.empty(0)

    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn", kernel)
    spans = ragged((Segment(0, 5, (2, 3)),), torch.device("cpu"))
    states = [torch.zeros(length, heads, 8, dtype=torch.bfloat16) for length, heads in ((10, 4), (20, 2), (20, 2))]
    assert cuda_backend.flash(*states, spans, 0.5).shape == (10, 4, 8)
    _, _, arguments = asked["kernel"]
    given = inspect.signature(varlen._varlen_attn._init_fn).bind(*states, *arguments).arguments
    assert given["cu_seq_q"].tolist() == [0, 5, 7, 10] and given["cu_seq_k"].tolist() == [0, 5, 12, 20]
    assert (given["max_q"], given["max_k"], given["scale"]) == (5, 8, 0.5)
    assert given["is_causal"] is True and given["enable_gqa"] is True and given["window_size"] == [-1, 0]


@no_gpu
def test_without_a_gpu_the_run_is_refused_with_what_torch_is_built_for(tmp_path, tiny_llama, capsys, monkeypatch):
    settings = {
        "model": {"path": str(tiny_llama), "precision": "fp32"},
        "data": {"train": {"name": "arithmetic"}, "max_prompt_tokens": 64},
        "reward": [{"name": "math"}], "backend": {"name": "cuda"},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for name in cuda_backend.CudaBackend().environment():
        monkeypatch.setenv(name, "0")  # not this process's from now on
    monkeypatch.setattr(attention, "use", lambda *_: sys.exit("used"))
    assert main(["grpo", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"rlcore: backend.name: cuda, but torch {torch.__version__}, which is built ")
    assert "finds no GPU (CUDA_VISIBLE_DEVICES is '3'); see nvidia-smi, or install requirements/cuda.txt" in said
    assert not (tmp_path / "run").exists()
