"""A converted folder is served by vLLM as the model that it came from."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from weight_models import convert, model

from rlcore import registry
from rlcore.config.sections import ModelConfig, RolloutConfig
from rlcore.model.loading import family_of
from rlcore.types import Row, Sampling

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


def test_the_exported_folder_answers_alike_in_vllm(tmp_path, backend):
    """Tokens and log-probabilities of a model, and of what comes back of it from Megatron-Core's format in several files."""
    base = model(tmp_path / "base", "tiny_llama", hidden_size=128, layers=2)
    convert("huggingface", "megatron", "--input", base, "--output", tmp_path / "dist")
    convert("megatron", "--input", tmp_path / "dist", "--base", base, "--output", tmp_path / "out", "--shard-size", 0.0005)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    one, other = (answers(folder, backend) for folder in (base, tmp_path / "out"))
    assert [sample.token_ids.tolist() for sample in one] == [sample.token_ids.tolist() for sample in other]
    assert all((first.logprobs == second.logprobs).all() for first, second in zip(one, other, strict=True))


def answers(folder, backend):
    family, build = family_of(folder, ModelConfig(path=str(folder))), registry.load("rollout_engines", "vllm")
    engine = build(family, folder, backend, RolloutConfig(), torch.float32, 256, 0)
    prompt = family.encode(Row("1", [{"role": "user", "content": "What is 4 + 5?"}]))
    (group,) = engine.generate([prompt], Sampling(1, 8, temperature=0))
    return group.samples
