"""A converted folder answers in vLLM as the model that it came from does in transformers."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import save_file
from weight_models import convert, model, tensors

from rlcore import registry
from rlcore.config.sections import ModelConfig, RolloutConfig
from rlcore.model.loading import family_of
from rlcore.types import Row, Sampling

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


def test_the_exported_folder_answers_alike_in_vllm(tmp_path, backend):
    """Greedy tokens and their log-probabilities, after Megatron-Core's format and back in several files."""
    base = model(tmp_path / "base", "tiny_llama", hidden_size=128, layers=2)
    calm = {name: tensor * 0.2 for name, tensor in tensors(base).items()}  # logits of a usual size
    save_file(calm, base / "model.safetensors", metadata={"format": "pt"})
    convert("huggingface", "megatron", "--input", base, "--output", tmp_path / "dist")
    convert("megatron", "--input", tmp_path / "dist", "--base", base, "--output", tmp_path / "out", "--shard-size", 0.0005)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    prompt, sample = answered(tmp_path / "out", backend)
    tokens, logprobs = continued(base, prompt, len(sample.token_ids))
    assert len(tokens) > 4 and sample.token_ids.tolist() == tokens.tolist()
    torch.testing.assert_close(torch.as_tensor(sample.logprobs), logprobs, rtol=0, atol=1e-4)


def answered(folder, backend):
    family, build = family_of(folder, ModelConfig(path=str(folder))), registry.load("rollout_engines", "vllm")
    engine = build(family, folder, backend, RolloutConfig(), torch.float32, 256, 0)
    prompt = family.encode(Row("1", [{"role": "user", "content": "What is 4 + 5?"}]))
    (group,) = engine.generate([prompt], Sampling(1, 8, temperature=0))
    return prompt, group.samples[0]


def continued(folder, prompt, count):
    """Transformers' most probable tokens and their log-probabilities."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.as_tensor(prompt.token_ids)[None]
    start, found = ids.shape[1], []
    with torch.no_grad():
        for _ in range(count):
            found.append(plain(ids).logits[0, -1].log_softmax(-1))
            ids = torch.cat([ids, found[-1].argmax()[None, None]], 1)
    return ids[0, start:], torch.stack(found).max(-1).values
