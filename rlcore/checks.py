"""Check results of `rlcore doctor`, and the protocol of a device's doctor plugin. Neither this nor a plugin imports torch."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import ClassVar, Literal, Protocol

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

Verdict = Literal["ok", "warning", "failure", "absent"]  # absent: missing, and nothing needs it


@dataclass(frozen=True)
class CheckResult:
    """Result of one check."""

    what: str
    verdict: Verdict
    seen: str  # the observation, with its numbers
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.remedy or self.verdict in ("ok", "absent"), f"{self.what}: a {self.verdict} needs a remedy"


@dataclass(frozen=True)
class Devices:
    """Devices visible to a process started now."""

    count: int
    seen: str  # where they were looked for, and what hides some


@dataclass(frozen=True)
class Trial:
    """Program to run in a process of its own: its last output line is the observation, a nonzero exit status a failure."""

    what: str
    program: str
    remedy: str
    seconds: float = 120


class Doctor(Protocol):
    """Device-specific machine checks: an entry point of rlcore.doctors, called without arguments."""

    precedence: ClassVar[int]  # --backend auto takes the highest that sees devices; 0 is for what is always there
    pins: ClassVar[Traversable]  # the requirements file of the whole stack
    decisive: ClassVar[Sequence[str]]  # its packages that must match their pins exactly
    versions: ClassVar[Mapping[str, str]]  # specifiers for what is not a package: Python, drivers, toolkits
    trials: ClassVar[Sequence[Trial]]  # run last, and only where torch can be imported

    def devices(self) -> Devices: ...

    def check_results(self) -> Iterator[CheckResult]: ...


def compared(what: str, version: str | None, wanted: str, missing: str, remedy: str) -> CheckResult:
    """Check a version against a specifier; `missing` says where one was looked for."""
    if version is None:
        return CheckResult(what, "failure", missing, remedy)
    if not satisfies(version, wanted):
        return CheckResult(what, "failure", f"{version}, not {wanted}", remedy)
    return CheckResult(what, "ok", version)


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version matches a specifier; False for an invalid version."""
    try:
        return SpecifierSet(wanted).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def loads(library: str) -> CheckResult:
    """Check in a process of its own whether the loader finds a shared library and its dependencies."""
    program = f"import ctypes; ctypes.CDLL({library!r}); print('the loader finds it, and all that it needs')"
    return attempt(Trial(library, program, "its folder must be in LD_LIBRARY_PATH before Python starts", 30))


def attempt(trial: Trial) -> CheckResult:
    """Run a trial in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", trial.program], capture_output=True, text=True, errors="replace", timeout=trial.seconds,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return CheckResult(trial.what, "failure", f"no answer within {trial.seconds:g} s", trial.remedy)
    if done.returncode == 0:
        return CheckResult(trial.what, "ok", _last_line(done.stdout))
    ended = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    return CheckResult(trial.what, "failure", error_in(done.stderr) or ended, trial.remedy)


def error_in(text: str) -> str:
    """The error of a traceback, with its original cause; the last line if there is none."""
    errors = [line for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception): ", line)]
    return errors[-1] + (f" (from {errors[0]})" if len(errors) > 1 else "") if errors else _last_line(text)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""
