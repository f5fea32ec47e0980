"""Run files of tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rlcore.data.sources import training_prompts
from rlcore.model.resolved import ResolvedModel
from rlcore.types import Prompt

ARITHMETIC = {"name": "arithmetic", "options": {"count": 16, "max_value": 9}}


def settings(model: Path, /, **sections: Any) -> dict[str, Any]:
    """A minimal run: the plain sampler, one thread, fp32."""
    return {
        "model": {"path": str(model), "precision": "fp32"},
        "backend": {"options": {"threads": 1}},
        "data": {"train": ARITHMETIC, "max_prompt_tokens": 64},
        "rollout": {"engine": "torch", "max_new_tokens": 4},
        "reward": [{"name": "math"}],
        "algorithm": {"group_size": 4},
        "train": {"steps": 2, "prompts_per_step": 2, "max_tokens_per_microbatch": 256},
        "logging": {"tensorboard": False},
        **sections,
    }


def write(folder: Path, model: Path, /, **sections: Any) -> Path:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings(model, **sections)), encoding="utf-8")
    return file


def first_prompts(resolved: ResolvedModel, count: int) -> list[Prompt]:
    """The first training prompts of a run."""
    return training_prompts(resolved.config.data, resolved.family, resolved.config.seed).draw(count)
