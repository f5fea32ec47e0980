"""Optimizer state: the moments, and the number of steps."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rlcore.distributed.parts import Stored, sharded
from rlcore.distributed.snapshot import Snapshot

_COUNT = torch.zeros(())  # what the optimizer's own count of steps looks like
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_optimizer(optimizer: torch.optim.Optimizer, steps: int, snapshot: Snapshot, folder: str = "") -> None:
    """Add the moments and the step count to the snapshot, in `folder` of the checkpoint."""
    states = (
        (f"{name}.{moment}", value)
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for moment, value in optimizer.state.get(parameter, {}).items()
    )
    snapshot.tensors(f"{folder}optimizer", states)
    snapshot.text(f"{folder}optimizer.json", json.dumps({"steps": steps}))


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Load the moments; returns the number of optimizer steps taken."""
    stored = Stored(folder)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if f"{name}.step" in stored:  # without one, no step has reached the parameter
                count = stored.part(f"{name}.step", _COUNT).to(parameter.device)
                moments = {moment: sharded(stored.part(f"{name}.{moment}", parameter), parameter) for moment in _MOMENTS}
                optimizer.state[parameter] = {"step": count, **moments}
    return json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))["steps"]
