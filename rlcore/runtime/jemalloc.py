"""jemalloc, where it is this process's malloc: what it holds of the system, and giving back what it holds for nothing.

It comes in by LD_PRELOAD, before a process starts: `preload` finds it for a launcher, and what has started looks for it with
`of_malloc`. Names and units are those of jemalloc's manual (jemalloc.net, MALLCTL NAMESPACE; 5.0 or newer). Linux.
`python -m rlcore.runtime.jemalloc` says what a process started like it has.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcore.errors import ConfigError

INSTALL = "apt install libjemalloc2 (Debian, Ubuntu) or dnf install jemalloc (openEuler)"
PREFIXES = ("", "je_", "_rjem_")  # a distribution's build, its own default where malloc is taken, that of Rust programs
CONSEQUENCE = "memory that processes free may stay with them"
CONFIGURATION = "background_thread:true"  # pages go back though a process only waits: 10 s after they were freed
_ALL = 4096  # MALLCTL_ARENAS_ALL
_PROBE = 2**20  # bytes; more than a call from Python allocates beside
_TRIAL_SECONDS = 60.0


@dataclass(frozen=True)
class Stats:
    """Bytes."""

    allocated: int  # by the program
    active: int  # in pages that hold some of it
    resident: int  # in memory: active pages, jemalloc's own data, and freed pages that it keeps
    retained: int  # addresses it keeps, whose pages the system has back


@dataclass(frozen=True)
class Decay:
    """Milliseconds that freed pages are kept before the system may take them, and then before it must; -1 is for ever."""

    dirty: int
    muzzy: int


class Jemalloc:
    """One that is loaded in this process, whether or not it is its malloc. OSError for names that its build lacks."""

    def __init__(self, mallctl: Any, prefix: str) -> None:
        """mallctl: the C function; prefix: what stands before its name."""
        size = ctypes.c_size_t
        mallctl.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.POINTER(size), ctypes.c_void_p, size]
        mallctl.restype = ctypes.c_int
        self._mallctl, self.prefix = mallctl, prefix

    def __str__(self) -> str:
        thread = "on" if self.background_thread else "off"
        version, kept = self.version.partition("-")[0], self.decay.dirty
        return f"jemalloc {version}, background thread {thread}, freed pages kept for {kept} ms"

    @property
    def version(self) -> str:
        return str(self._read("version", ctypes.c_char_p).decode())

    @property
    def serves_malloc(self) -> bool:
        """Whether what malloc gives is its own: a prefixed build leaves malloc alone, and so does one that is loaded late."""
        process = ctypes.CDLL(None)
        process.malloc.restype, process.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        try:
            before = self._read("thread.allocated", ctypes.c_uint64)
            process.free(process.malloc(_PROBE))  # arenas.lookup would know it by its address, but dies of a stranger's (5.3.0)
            return bool(self._read("thread.allocated", ctypes.c_uint64) - before >= _PROBE)
        except FileNotFoundError:  # a build that counts nothing
            return False

    @property
    def background_thread(self) -> bool:
        """Gives back what was freed long enough ago, also while the program frees nothing more."""
        try:
            return bool(self._read("background_thread", ctypes.c_bool))
        except FileNotFoundError:  # a build without
            return False

    @background_thread.setter
    def background_thread(self, on: bool) -> None:
        self._call("background_thread", new=ctypes.c_bool(on))

    @property
    def decay(self) -> Decay:
        """Of arenas that are made from now on."""
        return Decay(*(self._read(f"arenas.{kind}_decay_ms", ctypes.c_ssize_t) for kind in ("dirty", "muzzy")))

    @decay.setter
    def decay(self, decay: Decay) -> None:
        """Of these and those that are there. One for blocks of many MiB gives back at once unless it is told otherwise."""
        arenas = (f"arena.{number}" for number in range(self._read("arenas.narenas", ctypes.c_uint)))
        for arena in ("arenas", *(arena for arena in arenas if self._read(f"{arena}.initialized", ctypes.c_bool))):
            self._call(f"{arena}.dirty_decay_ms", new=ctypes.c_ssize_t(decay.dirty))
            self._call(f"{arena}.muzzy_decay_ms", new=ctypes.c_ssize_t(decay.muzzy))

    def stats(self) -> Stats | None:
        """Now; None where it was built without statistics."""
        if not self._read("config.stats", ctypes.c_bool):
            return None
        self._call("epoch", new=ctypes.c_uint64(1))  # statistics are of the moment when this was last done
        names = ("allocated", "active", "resident", "retained")
        return Stats(*(self._read(f"stats.{name}", ctypes.c_size_t) for name in names))

    def purge(self) -> None:
        """All freed pages of all arenas go back to the system now. Threads keep small blocks, the caller's excepted."""
        self._call("thread.tcache.flush")
        if not self.background_thread:
            return self._call(f"arena.{_ALL}.purge")
        self.background_thread = False  # a purge that meets one of its own does nothing (5.3.0: one in sixty)
        try:
            self._call(f"arena.{_ALL}.purge")
        finally:
            self.background_thread = True

    def _read(self, name: str, kind: type[Any]) -> Any:
        value = kind()
        self._call(name, old=value)
        return value.value

    def _call(self, name: str, old: Any = None, new: Any = None) -> None:
        length = ctypes.c_size_t(0 if old is None else ctypes.sizeof(old))
        outputs = (None, None) if old is None else (ctypes.byref(old), ctypes.byref(length))
        inputs = (None, 0) if new is None else (ctypes.byref(new), ctypes.sizeof(new))
        if error := self._mallctl(name.encode(), *outputs, *inputs):
            raise OSError(error, os.strerror(error), f"mallctl {name}")


def loaded() -> Iterator[Jemalloc]:
    """Every one that shows its symbols to the whole process."""
    process = ctypes.CDLL(None)
    return (Jemalloc(process[f"{prefix}mallctl"], prefix) for prefix in PREFIXES if hasattr(process, f"{prefix}mallctl"))


def of_malloc() -> Jemalloc | None:
    """The one that is this process's malloc."""
    return next((found for found in loaded() if found.serves_malloc), None)


def purge() -> None:
    """What was freed goes back to the system; nothing is done where malloc is another's."""
    if (found := of_malloc()) is not None:
        found.purge()


# before a process starts


def find(root: Path = Path("/"), machine: str | None = None) -> Path | None:
    """The library on this machine: one that was built here, else the distribution's."""
    multiarch = f"usr/lib/{machine or platform.machine()}-linux-gnu"  # Debian, Ubuntu; lib64 is openEuler's and Fedora's
    folders = ("usr/local/lib", "usr/local/lib64", multiarch, "usr/lib64", "usr/lib")
    return next((file for folder in folders if (file := root / folder / "libjemalloc.so.2").is_file()), None)


def preload(choice: str, environment: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Variables for processes to be started under jemalloc, and what to say of it, if anything.

    choice: auto is where it is found, off is never, all else the library's path; ConfigError for one that does not work here.
    What `environment` preloads already comes first.
    """
    if choice == "off" or inherited(environment):
        return {}, ""
    library = find() if choice == "auto" else Path(choice).absolute()
    if library is None:
        return {}, f"there is no jemalloc on this node: {CONSEQUENCE}; {INSTALL}, or JEMALLOC=off"
    before = [environment["LD_PRELOAD"]] if environment.get("LD_PRELOAD") else []
    added = {"LD_PRELOAD": ":".join([*before, str(library)]), "MALLOC_CONF": environment.get("MALLOC_CONF", CONFIGURATION)}
    refusal = _trial({**environment, **added})
    if refusal and choice != "auto":
        raise ConfigError(f"JEMALLOC: {library} cannot be preloaded: {refusal}; {INSTALL}, or JEMALLOC=off")
    return ({}, f"goes on without jemalloc: {library} cannot be preloaded: {refusal}") if refusal else (added, "")


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables by which a process of this environment has jemalloc, for processes that do not inherit by themselves."""
    preloaded = environment.get("LD_PRELOAD", "").replace(":", " ").split()
    libraries = [library for library in preloaded if "jemalloc" in Path(library).name]
    if not libraries:
        return {}
    return {"LD_PRELOAD": ":".join(libraries)} | {name: environment[name] for name in ("MALLOC_CONF",) if name in environment}


def _trial(environment: Mapping[str, str]) -> str:
    """Why a process of this environment has no jemalloc; empty when it has. A build for other page sizes ends every process."""
    command = [sys.executable, "-m", "rlcore.runtime.jemalloc"]
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=_TRIAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"a process under it does not end within {_TRIAL_SECONDS:g} s"
    said = " ".join(ended.stderr.split())
    return "" if ended.returncode == 0 else said or f"a process under it ends with status {ended.returncode}"


if __name__ == "__main__":
    found = of_malloc()
    sys.exit(print(found) if found else "malloc is not jemalloc's in this process")
