"""Checks of `rlcore doctor` for Ascend NPUs. Tested on simulated file trees; not run on an NPU machine."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

from rlcore.checks import CheckResult, Devices, Trial, compared, loads
from rlcore.diagnose.host import installed

_NPUS = """
import torch, torch_npu
if not torch.npu.is_available():
    raise SystemExit("torch.npu sees no NPU that it can use")
print(f"torch_npu {torch_npu.__version__}; {torch.npu.device_count()} x {torch.npu.get_device_name(0)}")
"""
_USELESS = "where the lines above are ok, npu-smi info says more; ASCEND_RT_VISIBLE_DEVICES must name NPUs that are there"
_NODES = ("davinci_manager", "devmm_svm", "hisi_hdc")  # beside davinciN; a container needs each


class NpuDoctor:
    """NPUs, their driver, CANN with its HCCL, and a torch that torch-npu can extend."""

    precedence: ClassVar[int] = 20
    pins = files("rlcore_requirements") / "npu.txt"
    decisive: ClassVar[tuple[str, ...]] = (
        "torch", "torch-npu", "torchvision", "transformers", "triton-ascend", "vllm", "vllm-ascend",
    )  # fmt: skip
    versions: ClassVar[Mapping[str, str]] = {
        "Python": ">=3.11,<3.13", "CANN": "==9.1.0", "NNAL": "==9.1.0", "glibc": ">=2.34",  # glibc: vllm-ascend's wheels
    }  # fmt: skip
    trials: ClassVar[tuple[Trial, ...]] = (Trial("torch.npu", _NPUS, _USELESS),)

    def __init__(self, root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> None:
        self._root, self._environment = root, environment
        self._ascend = root / "usr/local/Ascend"

    def devices(self) -> Devices:
        nodes = [path for path in self._root.joinpath("dev").glob("davinci*") if re.fullmatch(r"davinci\d+", path.name)]
        shown = self._environment.get("ASCEND_RT_VISIBLE_DEVICES")
        if shown is None or not nodes:
            return Devices(len(nodes), f"{len(nodes)} NPUs as /dev/davinci*")
        count = min(len([name for name in shown.split(",") if name.strip()]), len(nodes))
        return Devices(count, f"{count} of {len(nodes)} NPUs in /dev (ASCEND_RT_VISIBLE_DEVICES={shown})")

    def check_results(self) -> Iterator[CheckResult]:
        yield self._npus()
        yield compared("glibc", platform.libc_ver()[1] or None, self.versions["glibc"], "no glibc", "use a newer distribution")
        yield self._driver()
        yield self._cann()
        yield self._nnal()
        hccl = loads("libhccl.so")
        yield hccl if hccl.verdict == "ok" else CheckResult(hccl.what, "failure", hccl.seen, self._sourcing())
        yield from self._build()

    def _npus(self) -> CheckResult:
        devices = self.devices()
        absent = [f"/dev/{name}" for name in _NODES if not self._root.joinpath("dev", name).exists()]
        if devices.count and not absent:
            return CheckResult("NPUs", "ok", devices.seen)
        seen = devices.seen + (f"; {', '.join(absent)} not there" if absent else "")
        remedy = "install Ascend's driver and firmware; in a container: docker run --device /dev/davinci0 " + " ".join(
            f"--device /dev/{name}" for name in _NODES
        )
        hidden = "" if devices.count or "VISIBLE" not in devices.seen else "; or unset ASCEND_RT_VISIBLE_DEVICES"
        return CheckResult("NPUs", "failure", seen, remedy + hidden)

    def _driver(self) -> CheckResult:
        file = self._ascend / "driver/version.info"
        if version := _entry(file, "version"):
            return CheckResult("Ascend driver", "ok", f"{version}; CANN's release notes say which drivers it runs on")
        remedy = f"install Ascend's driver on the host; in a container: docker run -v {file.parent}:{file.parent}"
        return CheckResult("Ascend driver", "failure", f"{file} names no version, or is not there", remedy)

    def _cann(self) -> CheckResult:
        """Version of the CANN that set_env.sh put into ASCEND_HOME_PATH."""
        wanted, folder = self.versions["CANN"], self._environment.get("ASCEND_HOME_PATH")
        if not folder:
            return CheckResult("CANN", "failure", "ASCEND_HOME_PATH is not set", f"install CANN {wanted}; {self._sourcing()}")
        if not Path(folder).is_dir():
            seen = f"ASCEND_HOME_PATH is {folder}, which is not there"
            return CheckResult("CANN", "failure", seen, f"unset ASCEND_HOME_PATH; {self._sourcing()}")
        missing = f"{folder} holds no ascend_*_install.info that says its version"
        return compared("CANN", _cann_version(Path(folder)), wanted, missing, f"install CANN {wanted}; {self._sourcing()}")

    def _nnal(self) -> CheckResult:
        """NNAL; its version is a component of the folder's path."""
        wanted, folder = self.versions["NNAL"], self._environment.get("ATB_HOME_PATH")
        remedy = f"install NNAL {wanted}; source {self._ascend}/nnal/atb/set_env.sh before Python starts"
        if not folder or not Path(folder, "lib/libatb.so").is_file():
            seen = f"{folder}/lib/libatb.so is not there" if folder else "ATB_HOME_PATH is not set"
            return CheckResult("NNAL", "failure", seen, remedy)
        place = Path(folder).resolve()
        version = next((part for part in place.parts if re.fullmatch(r"\d+\.\d+\.\w+", part)), None)
        return (
            compared("NNAL", version, wanted, "", remedy) if version else CheckResult("NNAL", "ok", f"{place}, version unknown")
        )

    def _sourcing(self) -> str:
        """Remedy: the command that sources CANN's set_env.sh, with its path where it is in a usual place."""
        places = sorted(self._ascend.glob("ascend-toolkit/set_env.sh")) + sorted(self._ascend.glob("cann*/set_env.sh"))
        return f"source {places[-1] if places else self._ascend / 'cann/set_env.sh'} before Python starts"

    def _build(self) -> Iterator[CheckResult]:
        """Packages of the right version that are built for CUDA or replace those built for Ascend."""
        torch, vllm, triton = installed("torch"), installed("vllm"), installed("triton")
        if torch and "+cpu" not in torch and platform.machine() == "x86_64":  # on aarch64 PyPI's build is for the CPU
            remedy = "pip install --no-deps --force-reinstall torch from PyTorch's CPU index (docs/backends.md)"
            yield CheckResult("torch's build", "failure", f"{torch} may be built for CUDA, which torch-npu refuses", remedy)
        if vllm and "+empty" not in vllm:
            remedy = "build it from source with VLLM_TARGET_DEVICE=empty (docs/backends.md)"
            yield CheckResult("vllm's build", "warning", f"{vllm} may be the wheel with CUDA kernels", remedy)
        if triton:
            remedy = "pip uninstall triton triton-ascend, then install triton-ascend (docs/backends.md)"
            yield CheckResult(
                "triton", "failure", f"{triton} stands where triton-ascend must: both are imported as triton", remedy
            )


def _cann_version(folder: Path) -> str | None:
    """CANN's version, from the files that torch-npu reads too."""
    files = [*folder.glob("ascend_*_install.info"), *folder.glob("*/ascend_*_install.info")]
    return next(filter(None, (_entry(file, "version") for file in sorted(files))), None)


def _entry(file: Path, key: str) -> str | None:
    """The value of a line `key=value`, whatever the key's case."""
    if not file.is_file():
        return None
    found = re.search(rf"^{key}\s*=\s*\[?([^\]\s]+)", file.read_text(errors="replace"), re.MULTILINE | re.IGNORECASE)
    return found and found[1]
