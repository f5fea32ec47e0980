"""Checks of `rlcore doctor` for NVIDIA GPUs. Written from NVIDIA's documentation; not run on a GPU machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

from rlcore.checks import CheckResult, Devices, Trial, compared, loads
from rlcore.diagnose.host import installed

_GPUS = """
import torch
if torch.version.cuda is None:
    raise SystemExit(f"torch {torch.__version__} is built without CUDA")
if not torch.cuda.is_available():
    raise SystemExit("torch.cuda sees no GPU that it can use")
names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
print(f"CUDA {torch.version.cuda};", ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in names))
"""
_TORCHVISION = """
import torch, torchvision
torch.ops.torchvision.nms
print(torchvision.__version__, "imports; its operators load")
"""
_USELESS = "where the lines above are ok, nvidia-smi says more; CUDA_VISIBLE_DEVICES must name GPUs that are there"
_REINSTALL = "pip install --no-deps --force-reinstall as cuda.txt pins it, from PyPI (docs/backends.md)"


class CudaDoctor:
    """GPUs, their driver, and a torch built for CUDA. The CUDA libraries are packages of the stack: no toolkit is needed."""

    precedence: ClassVar[int] = 10
    pins = files("rlcore_requirements") / "cuda.txt"
    decisive: ClassVar[tuple[str, ...]] = ("torch", "torchvision", "transformers", "vllm")
    versions: ClassVar[Mapping[str, str]] = {"Python": ">=3.11,<3.13", "NVIDIA driver": ">=580"}  # minimum for CUDA 13
    trials: ClassVar[tuple[Trial, ...]] = (
        Trial("torch.cuda", _GPUS, _USELESS),
        Trial("import torchvision", _TORCHVISION, f"torchvision must belong to torch: {_REINSTALL}"),
    )

    def __init__(self, root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> None:
        self._root, self._environment = root, environment

    def devices(self) -> Devices:
        nodes = [path for path in self._root.joinpath("dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
        shown = self._environment.get("CUDA_VISIBLE_DEVICES")
        if shown is None or not nodes:
            return Devices(len(nodes), f"{len(nodes)} GPUs as /dev/nvidia*")
        listed = [name.strip() for name in shown.split(",")]
        visible = listed[: listed.index("-1")] if "-1" in listed else listed  # CUDA stops there
        count = min(len(list(filter(None, visible))), len(nodes))
        return Devices(count, f"{count} of {len(nodes)} GPUs in /dev (CUDA_VISIBLE_DEVICES={shown})")

    def check_results(self) -> Iterator[CheckResult]:
        devices = self.devices()
        remedy = "install NVIDIA's driver; in a container: docker run --gpus all. If they are there: unset CUDA_VISIBLE_DEVICES"
        yield CheckResult("GPUs", "ok", devices.seen) if devices.count else CheckResult("GPUs", "failure", devices.seen, remedy)
        wanted = self.versions["NVIDIA driver"]
        yield compared(
            "NVIDIA driver", self._driver(), wanted, "no kernel module: /proc/driver/nvidia/version is not there",
            f"install NVIDIA's driver {wanted} on the host",
        )  # fmt: skip
        yield loads("libcuda.so.1")
        yield from self._build()

    def _driver(self) -> str | None:
        file = self._root / "proc/driver/nvidia/version"
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", file.read_text()) if file.is_file() else None
        return found and found[1]

    def _build(self) -> Iterator[CheckResult]:
        """A pin of 2.13.0 allows 2.13.0+cpu, which sees no GPU."""
        version = installed("torch")
        if version and "+cpu" in version:
            yield CheckResult("torch's build", "failure", f"{version} is built without CUDA", _REINSTALL)
