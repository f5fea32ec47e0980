"""Save and load optimizer state as safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rlcore.distributed import world
from rlcore.distributed.fsdp import as_dealt, collected


def save_optimizer(optimizer: torch.optim.Optimizer, steps: int, folder: Path) -> None:
    """Gather the moments of all ranks; the first rank writes them and the step count."""
    tensors = collected(
        (f"{name}.{moment}", value)
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for moment, value in optimizer.state.get(parameter, {}).items()
    )
    if world.first():
        save_file(tensors, folder / "optimizer.safetensors")
        (folder / "optimizer.json").write_text(json.dumps({"steps": steps}), encoding="utf-8")


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Load the moments; returns the number of optimizer steps taken."""
    tensors = load_file(folder / "optimizer.safetensors")
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            titles = {moment: f"{name}.{moment}" for moment in ("step", "exp_avg", "exp_avg_sq")}
            moments = {moment: tensors[title] for moment, title in titles.items() if title in tensors}
            if moments.keys() == titles.keys():
                optimizer.state[parameter] = {
                    moment: value.to(parameter.device) if moment == "step" else as_dealt(value, parameter)
                    for moment, value in moments.items()
                }
    return json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))["steps"]
