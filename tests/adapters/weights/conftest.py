"""Checkpoints of tiny models, trained (that is, sharded and saved) once for all tests of formats."""

from __future__ import annotations

from pathlib import Path

import pytest
from weight_models import model, trained


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> Path:
    """Model folders: text, tied and not; vision; experts."""
    folder = tmp_path_factory.mktemp("bases")
    model(folder / "text", "tiny_qwen3", tied=False)
    model(folder / "vision", "tiny_qwen2_5_vl")
    model(folder / "experts", "tiny_qwen3_moe")
    return folder


@pytest.fixture(scope="session")
def checkpoints(bases, tmp_path_factory) -> Path:
    """What two ranks of FSDP2 saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    jobs = {
        "chatlearn_text": "text", "chatlearn_vision": "vision", "chatlearn_experts": "experts", "chatlearn_grouped": "experts",
        "chatlearn_second": "vision", "rlinf_vision": "vision", "rlinf_lora": "vision", "rlinf_experts": "experts",
    }  # fmt: skip
    trained(folder, *(f"{name}={bases / base}" for name, base in jobs.items()))
    return folder
