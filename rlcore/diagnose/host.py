"""Checks of the host that every device needs. Imports nothing of the stack that it checks."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from importlib.resources.abc import Traversable
from pathlib import Path

from packaging.requirements import Requirement

from rlcore.checks import CheckResult, compared
from rlcore.runtime.jemalloc import find, inherited

_GIB = 2**30
SHM = Path("/dev/shm")


def read_pins(file: Traversable) -> dict[str, Requirement]:
    """Name -> requirement, of a file whose every line is `name==version`."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def installed(name: str) -> str | None:
    """Version of a package; None if it is not installed. Imports nothing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def python(wanted: str) -> CheckResult:
    own = metadata.metadata("rlcore")["Requires-Python"]
    both = ",".join(filter(None, (own, wanted)))
    remedy = f"make the environment anew with a Python {both}"
    return compared("Python", platform.python_version(), both, "", remedy)


def packages(file: Traversable, decisive: Sequence[str]) -> Iterator[CheckResult]:
    """Check the installed versions against the pins: one result per decisive package, one for all the others together."""
    pins = read_pins(file)
    found = {name: installed(name) for name in pins}
    for name in decisive:
        where, remedy = f"not installed; {pins[name]} is pinned", f"pip install --no-deps '{pins[name]}' (docs/backends.md)"
        yield compared(name, found[name], str(pins[name].specifier), where, remedy)
    others = [name for name in pins if name not in decisive]
    missing = [name for name in others if found[name] is None]
    differing = [f"{name} {found[name]}" for name in others if found[name] and not _meets(pins[name], found[name])]
    seen = [f"{len(missing)} of {len(others)} are missing: {_few(missing)}"] if missing else []
    seen += [f"{len(differing)} of {len(others)} differ: {_few(differing)}"] if differing else []
    if seen:
        verdict = "failure" if missing else "warning"
        yield CheckResult("other packages", verdict, "; ".join(seen), f"pip install --no-deps -r {file}")
    else:
        yield CheckResult("other packages", "ok", f"all {len(others)} are as pinned in {file.name}")


def own_requirements() -> CheckResult:
    """Check rlcore's own requirements, the same for every device."""
    declared = map(Requirement, metadata.requires("rlcore") or ())
    asked = [one for one in declared if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = {one.name: installed(one.name) for one in asked}
    if wrong := [f"{one} ({found[one.name] or 'missing'})" for one in asked if not _meets(one, found[one.name])]:
        return CheckResult(
            "rlcore", "failure", f"asks for {', '.join(wrong)}", "install what the stack's requirements file pins"
        )
    return CheckResult("rlcore", "ok", f"{metadata.version('rlcore')}, all {len(asked)} of its own requirements are met")


def apex() -> CheckResult:
    """Check which apex this is: PyPI's is an unrelated toolkit for Pyramid, and installing it runs its setup."""
    spec, version = importlib.util.find_spec("apex"), installed("apex")
    if spec is None and version is None:
        return CheckResult("apex", "absent", "only backend.options.optimizer: apex needs it")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if any(Path(folder, "optimizers").is_dir() for folder in folders):
        return CheckResult("apex", "ok", f"{version or 'no version'}, with fused optimizers")
    seen = f"{version or 'no version'} is not the one with fused optimizers; PyPI's apex is a toolkit for Pyramid web sites"
    return CheckResult(
        "apex", "failure", seen, "pip uninstall apex; the real ones are built from source, and rlcore does without"
    )


def shared_memory(folder: Path = SHM) -> CheckResult:
    """Check /dev/shm, which holds Ray's objects and the exchange between processes; Docker's default is 64 MiB."""
    remedy = "docker run --shm-size=16g (or --ipc=host); elsewhere: mount -o remount,size=16g /dev/shm"
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        return CheckResult("shared memory", "failure", f"{folder} is not there, or not writable", remedy)
    space = shutil.disk_usage(folder)
    seen = f"{space.free / _GIB:.2f} of {space.total / _GIB:.2f} GiB are free in {folder}"
    if space.free < _GIB / 32:
        return CheckResult("shared memory", "failure", seen, remedy)
    if space.free < 4 * _GIB:
        return CheckResult("shared memory", "warning", f"{seen}; several processes want 4 or more", remedy)
    return CheckResult("shared memory", "ok", seen)


def limits() -> Iterator[CheckResult]:
    """Check the soft resource limits of a process."""
    yield _limit("open files", resource.RLIMIT_NOFILE, 1024, 8192, "ulimit -n 65536, or docker run --ulimit nofile=65536:65536")
    yield _limit("processes", resource.RLIMIT_NPROC, 512, 4096, "ulimit -u 65536, or docker run --ulimit nproc=65536:65536")
    if list(Path("/sys/class/infiniband").glob("*")):  # InfiniBand cards register memory, which must stay locked
        remedy = "ulimit -l unlimited, or docker run --ulimit memlock=-1:-1"
        yield _limit("locked memory", resource.RLIMIT_MEMLOCK, 0, resource.RLIM_INFINITY, remedy)


def _limit(what: str, kind: int, least: int, wanted: int, remedy: str) -> CheckResult:
    soft, hard = resource.getrlimit(kind)
    seen = f"{_count(soft)} at most (hard limit {_count(hard)})"
    if soft == resource.RLIM_INFINITY or (soft >= wanted and wanted != resource.RLIM_INFINITY):
        return CheckResult(what, "ok", seen)
    if soft < least:
        return CheckResult(what, "failure", f"{seen}; at least {least} are needed", remedy)
    return CheckResult(what, "warning", f"{seen}; many devices want {_count(wanted)}", remedy)


def compiler(environment: Mapping[str, str]) -> CheckResult:
    """Check for a C++ compiler with its headers: packages without wheels for this machine are built with it."""
    command = shlex.split(environment.get("CXX") or "g++")
    remedy = "apt-get install g++ (or the distribution's like; CXX names another); only packages built from source need it"
    if shutil.which(command[0]) is None:
        return CheckResult("C++ compiler", "warning", f"{command[0]} is not found", remedy)
    program = "#include <cstdint>\nstd::uint8_t byte;\n"
    done = subprocess.run(
        [*command, "-fsyntax-only", "-x", "c++", "-"], input=program, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
        return CheckResult("C++ compiler", "warning", f"{command[0]} does not compile #include <cstdint>: {said}", remedy)
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    return CheckResult("C++ compiler", "ok", f"{version.splitlines()[0] if version else command[0]}; <cstdint> compiles")


def jemalloc(environment: Mapping[str, str]) -> CheckResult:
    preloaded = inherited(environment).get("LD_PRELOAD", "").split(":")
    if gone := [name for name in preloaded if "/" in name and not Path(name).exists()]:
        return CheckResult(
            "jemalloc", "warning", f"LD_PRELOAD names {gone[0]}, which is not there", "correct or unset LD_PRELOAD"
        )
    if any(preloaded):
        return CheckResult("jemalloc", "ok", f"preloaded: {preloaded[0]}")
    if library := find():
        return CheckResult("jemalloc", "ok", f"{library} is there; LD_PRELOAD does not name it")
    return CheckResult("jemalloc", "absent", "optional: long runs on the host's memory fragment less with it")


def _meets(requirement: Requirement, version: str | None) -> bool:
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _few(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _count(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
