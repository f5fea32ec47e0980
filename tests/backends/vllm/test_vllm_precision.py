"""Difference between engine and trainer log-probabilities in each precision, for text and images, before and after an
update: the bounds are tight enough that one missing weight breaks them."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlcore import registry
from rlcore.config.schema import RunConfig
from rlcore.data.sources import training_prompts
from rlcore.model.resolved import ResolvedModel
from rlcore.runtime.placement import local
from rlcore.runtime.watchdog import Watchdog
from rlcore.types import Batch, Sampling

SIZES = {"hidden_size": 128, "layers": 2, "heads": 2, "key_value_heads": 1}  # head size 64 has engine kernels
DATA = {"tiny_qwen3": "arithmetic", "tiny_qwen2_5_vl": "geometry_figures"}
LIMITS = {"fp32": (1e-5, 1e-4), "bf16": (0.015, 0.15)}  # nats: mean, max


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("source", DATA)
def test_the_engine_is_as_near_to_the_trainer_as_its_precision_says(source, precision, tmp_path):
    kind = registry.load("backends", "cpu")
    backend = kind(kind.Options(threads=1, kv_cache_gib=0.1))
    for engine in ["torch", *(["vllm"] if importlib.util.find_spec("vllm") else [])]:
        config = RunConfig.model_validate({
            "model": {"path": source, "options": SIZES, "precision": precision},
            "data": {"train": {"name": DATA[source]}, "max_prompt_tokens": 96},
            "rollout": {"engine": engine, "max_new_tokens": 12}, "algorithm": {"group_size": 4}, "optimizer": {"lr": 1e-3},
        })  # fmt: skip
        near(ResolvedModel(config, backend), tmp_path, *LIMITS[precision])


def near(resolved: ResolvedModel, folder: Path, mean: float, most: float) -> None:
    with local(resolved, Watchdog(0, folder)) as run:
        run.load("grpo")
        run.start_engines()
        prompts = training_prompts(resolved.config.data, resolved.family, seed=0).draw(4)
        for version in range(3):
            assert run.sync_weights().version == version
            batch = Batch.of(run.rollout.generate(prompts, Sampling(4, 12, seed=version)))
            gap = (run.actor.logprobs(batch) - batch.rollout_logprobs).abs()
            assert gap.mean() < mean and gap.max() < most, (version, float(gap.mean()), float(gap.max()))
            run.update(replace(batch, advantages=torch.linspace(-1, 1, len(batch.loss_mask))))
        moved = (run.actor.logprobs(batch) - batch.rollout_logprobs).abs()
        assert moved.mean() > 2 * mean, "weights that do not arrive show"
