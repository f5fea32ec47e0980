"""Runs rlcore commands on the simulated device and reports which operators ran where: session.py COMMANDS.json REPORT.json,
the former a list of argument lists. Ends with the checks of the device itself."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu
from torch.utils._python_dispatch import TorchDispatchMode
from torch_npu import dispatch

from rlcore import registry
from rlcore.cli.main import main as rlcore

sys.path.insert(0, str(Path(__file__).parents[1]))
import tripwire

_HEAVY = (*dispatch.PRODUCTS, "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_fused_adamw_")


class Stayed(TorchDispatchMode):
    """Counts the heavy operators that get CPU tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = operator._schema.name
        if name in _HEAVY and any(tensor.device.type == "cpu" for tensor in _tensors(arguments)):
            self.counts[name] += 1
        return operator(*arguments, **(options or {}))


def _tensors(argument: Any) -> list[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        return [argument] if argument.dim() else []
    return [tensor for each in argument for tensor in _tensors(each)] if isinstance(argument, list | tuple) else []


def main(commands: Path, report: Path) -> None:
    """Attention uses the device's kernel in float32 too, where errors of 1e-4 are visible."""
    tripwire.arm()
    registry.load("backends", "npu")().prepare()
    from rlcore_backends.npu import operators

    operators.DTYPES = (*operators.DTYPES, torch.float32)
    with Stayed() as stayed:
        statuses = [rlcore(command) for command in json.loads(commands.read_text(encoding="utf-8"))]
    ran = dict(dispatch.counts)
    files = [str(Path(__file__).with_name(name)) for name in ("checks.py", "operator_checks.py")]
    checks = pytest.main(["-q", "--noconftest", "-p", "no:cacheprovider", *files])
    said = {"statuses": statuses, "device": ran, "processor": dict(stayed.counts), "checks": int(checks)}
    report.write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    assert torch_npu.__version__ == "simulated" and os.environ.get("PYTHONPATH")
    main(*map(Path, sys.argv[1:]))
