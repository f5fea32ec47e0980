"""The cuda plugin against what it calls: names and signatures in the pinned torch and vLLM. No GPU is used."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys

import pytest
import torch
import yaml
from rlcore_backends import cuda

from rlcore import attention, cli
from rlcore.attention import ragged
from rlcore.packing import Segment

vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@vllm
def test_vllm_has_every_engine_argument_that_is_set():
    from vllm import EngineArgs

    assert cuda.CudaBackend().engine_options("vllm").keys() <= {field.name for field in dataclasses.fields(EngineArgs)}


@vllm
def test_vllm_reads_every_variable_of_its_own_that_is_set():
    from vllm import envs

    own = {name for name in cuda.CudaBackend().environment() if name.startswith("VLLM_")}
    assert own and own <= envs.environment_variables.keys()


@vllm
def test_an_engine_sleeps_and_wakes_as_it_is_asked_to():
    from vllm import LLM
    from vllm.config import ModelConfig

    inspect.signature(LLM.sleep).bind(None, level=1)
    inspect.signature(LLM.wake_up).bind(None)
    assert "enable_sleep_mode" in {field.name for field in dataclasses.fields(ModelConfig)}


def test_the_attention_kernel_is_called_as_torch_declares_it(monkeypatch):
    """Torch's own checks of arguments run; the kernel behind them does not."""
    from torch.nn.attention import varlen

    asked = {}

    def kernel(query, key, value, *arguments):
        asked["kernel"] = (query.shape, key.shape, arguments)
        return torch.empty_like(query), torch.empty(0), torch.empty(0)

    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn", kernel)
    spans = ragged((Segment(0, 5, (2, 3)),), torch.device("cpu"))
    states = [torch.zeros(length, heads, 8, dtype=torch.bfloat16) for length, heads in ((10, 4), (20, 2), (20, 2))]
    assert cuda.flash(*states, spans, 0.5).shape == (10, 4, 8)
    _, _, arguments = asked["kernel"]
    given = inspect.signature(varlen._varlen_attn._init_fn).bind(*states, *arguments).arguments
    assert given["cu_seq_q"].tolist() == [0, 5, 7, 10] and given["cu_seq_k"].tolist() == [0, 5, 12, 20]
    assert (given["max_q"], given["max_k"], given["scale"]) == (5, 8, 0.5)
    assert given["is_causal"] is True and given["enable_gqa"] is True and given["window_size"] == [-1, 0]


@no_gpu
def test_without_a_gpu_the_run_is_refused_with_what_torch_is_built_for(tmp_path, tiny_llama, capsys, monkeypatch):
    settings = {
        "model": {"path": str(tiny_llama)}, "data": {"train": {"name": "arithmetic"}, "max_prompt_tokens": 64},
        "reward": [{"name": "math"}], "backend": {"name": "cuda"},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for name in cuda.CudaBackend().environment():
        monkeypatch.setenv(name, "0")  # not this process's from now on
    monkeypatch.setattr(attention, "use", lambda *_: sys.exit("used"))
    assert cli.main(["grpo", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"rlcore: backend.name: cuda, but torch {torch.__version__}, which is built ")
    assert "finds no GPU (CUDA_VISIBLE_DEVICES is '3'); see nvidia-smi, or install requirements/cuda.txt" in said
    assert not (tmp_path / "run").exists()
