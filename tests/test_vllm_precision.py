"""How far the engine's log-probabilities are from the trainer's, in each precision, for text and for images, before and after
an update: a bound that a weight which did not arrive breaks."""

from __future__ import annotations

import gc
import importlib.util
from dataclasses import replace

import pytest
import torch

from rlcore.config import RunConfig
from rlcore.placement import local
from rlcore.types import Batch, Sampling
from rlcore.watch import Watch
from rlcore.worker import Policy

SIZES = {"hidden_size": 128, "layers": 2, "heads": 2, "key_value_heads": 1}  # heads of 64, which the engine has kernels for
DATA = {"tiny_qwen3": "arithmetic", "tiny_qwen2_5_vl": "geometry_figures"}
LIMITS = {"fp32": (1e-5, 1e-4), "bf16": (0.015, 0.15)}  # nats: on average, and at most


@pytest.mark.parametrize("engine", ["torch", "vllm"])
@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("source", DATA)
def test_the_engine_is_as_near_to_the_trainer_as_its_precision_says(source, precision, engine, backend, tmp_path):
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    config = RunConfig.model_validate({
        "model": {"path": source, "options": SIZES, "precision": precision},
        "backend": {"options": {"threads": 1, "kv_cache_gib": 0.1}},
        "data": {"train": {"name": DATA[source]}, "max_prompt_tokens": 96}, "rollout": {"engine": engine, "max_new_tokens": 12},
        "algorithm": {"group_size": 4}, "optimizer": {"lr": 1e-3}, "reward": [{"name": "math"}],
    })  # fmt: skip
    policy, (mean, most) = Policy(config, backend), LIMITS[precision]
    with local(policy, Watch(0, tmp_path)) as run:
        run.load("grpo")
        run.start_engines()
        prompts = policy.prompts(seed=0).draw(4)
        for version in range(3):
            assert run.sync_weights().version == version
            batch = Batch.of(run.rollout.generate(prompts, Sampling(4, 12, seed=version)))
            gap = (run.actor.logprobs(batch) - batch.rollout_logprobs).abs()
            assert gap.mean() < mean and gap.max() < most, (version, float(gap.mean()), float(gap.max()))
            run.update(replace(batch, advantages=torch.linspace(-1, 1, len(batch.loss_mask))))
        moved = (run.actor.logprobs(batch) - batch.rollout_logprobs).abs()
        assert moved.mean() > 2 * mean, "weights that do not arrive show"
    del run
    gc.collect()  # before another engine starts in this process
