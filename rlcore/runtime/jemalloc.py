"""jemalloc as this process's malloc: its memory statistics, and returning freed pages to the system.

LD_PRELOAD loads it before a process starts: `preload` finds it for a launcher, `of_malloc` detects it in a running process.
Names and units are those of jemalloc's manual (jemalloc.net, MALLCTL NAMESPACE; 5.0 or newer). Linux.
`python -m rlcore.runtime.jemalloc` prints the jemalloc that a process of this environment has.
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
PREFIXES = ("", "je_", "_rjem_")  # distribution builds; jemalloc's default where malloc is taken; Rust programs
CONSEQUENCE = "memory that processes free may stay with them"
CONFIGURATION = "background_thread:true"  # returns pages 10 s after they were freed, even in an idle process
_ALL = 4096  # MALLCTL_ARENAS_ALL
_PROBE = 2**20  # bytes; more than the Python call itself allocates
_TRIAL_SECONDS = 60.0


@dataclass(frozen=True)
class Stats:
    """Memory statistics in bytes."""

    allocated: int  # by the program
    active: int  # in pages with allocations
    resident: int  # in physical memory: active pages, jemalloc's own data, and freed pages that it keeps
    retained: int  # address space it keeps after returning the pages


@dataclass(frozen=True)
class Decay:
    """Milliseconds until the system may reclaim freed pages (dirty), and from then until it gets them (muzzy); -1 is never."""

    dirty: int
    muzzy: int


class Jemalloc:
    """A jemalloc loaded in this process, whether or not it is its malloc. OSError for names that its build lacks."""

    def __init__(self, mallctl: Any, prefix: str) -> None:
        """mallctl: the C function; prefix: of its symbol name."""
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
        """Whether it is the process's malloc: a prefixed build leaves malloc alone, and so does one that is loaded late."""
        process = ctypes.CDLL(None)
        process.malloc.restype, process.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        try:
            before = self._read("thread.allocated", ctypes.c_uint64)
            process.free(process.malloc(_PROBE))  # arenas.lookup would tell by address, but crashes on a foreign one (5.3.0)
            return bool(self._read("thread.allocated", ctypes.c_uint64) - before >= _PROBE)
        except FileNotFoundError:  # built without statistics
            return False

    @property
    def background_thread(self) -> bool:
        """Whether a thread returns pages after their decay time, also while the program frees nothing more."""
        try:
            return bool(self._read("background_thread", ctypes.c_bool))
        except FileNotFoundError:  # built without it
            return False

    @background_thread.setter
    def background_thread(self, on: bool) -> None:
        self._call("background_thread", new=ctypes.c_bool(on))

    @property
    def decay(self) -> Decay:
        """Decay times of arenas created from now on."""
        return Decay(*(self._read(f"arenas.{kind}_decay_ms", ctypes.c_ssize_t) for kind in ("dirty", "muzzy")))

    @decay.setter
    def decay(self, decay: Decay) -> None:
        """Also set those of existing arenas. The arena for blocks of many MiB returns pages at once unless told otherwise."""
        arenas = (f"arena.{number}" for number in range(self._read("arenas.narenas", ctypes.c_uint)))
        for arena in ("arenas", *(arena for arena in arenas if self._read(f"{arena}.initialized", ctypes.c_bool))):
            self._call(f"{arena}.dirty_decay_ms", new=ctypes.c_ssize_t(decay.dirty))
            self._call(f"{arena}.muzzy_decay_ms", new=ctypes.c_ssize_t(decay.muzzy))

    def stats(self) -> Stats | None:
        """Current statistics; None if built without them."""
        if not self._read("config.stats", ctypes.c_bool):
            return None
        self._call("epoch", new=ctypes.c_uint64(1))  # refreshes the statistics
        names = ("allocated", "active", "resident", "retained")
        return Stats(*(self._read(f"stats.{name}", ctypes.c_size_t) for name in names))

    def purge(self) -> None:
        """Return all freed pages of all arenas to the system now. Other threads keep their caches of small blocks."""
        self._call("thread.tcache.flush")
        if not self.background_thread:
            return self._call(f"arena.{_ALL}.purge")
        self.background_thread = False  # a purge during one of its own does nothing (5.3.0: one in sixty)
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
    """Every jemalloc whose symbols are global in this process."""
    process = ctypes.CDLL(None)
    return (Jemalloc(process[f"{prefix}mallctl"], prefix) for prefix in PREFIXES if hasattr(process, f"{prefix}mallctl"))


def of_malloc() -> Jemalloc | None:
    """The jemalloc that is this process's malloc, or None."""
    return next((found for found in loaded() if found.serves_malloc), None)


def purge() -> None:
    """Return freed pages to the system; does nothing where malloc is not jemalloc's."""
    if (found := of_malloc()) is not None:
        found.purge()


# before a process starts


def find(root: Path = Path("/"), machine: str | None = None) -> Path | None:
    """Find the library on this machine: one built here, else the distribution's."""
    multiarch = f"usr/lib/{machine or platform.machine()}-linux-gnu"  # Debian, Ubuntu; lib64 is openEuler's and Fedora's
    folders = ("usr/local/lib", "usr/local/lib64", multiarch, "usr/lib64", "usr/lib")
    return next((file for folder in folders if (file := root / folder / "libjemalloc.so.2").is_file()), None)


def preload(choice: str, environment: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Environment variables that start processes under jemalloc, and a message for the user, or "".

    choice: auto (where it is found), off, or the library's path; ConfigError for a path that does not work here.
    Libraries that `environment` preloads already come first.
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
    """The variables that preload jemalloc in this environment, for processes that do not inherit it."""
    preloaded = environment.get("LD_PRELOAD", "").replace(":", " ").split()
    libraries = [library for library in preloaded if "jemalloc" in Path(library).name]
    if not libraries:
        return {}
    return {"LD_PRELOAD": ":".join(libraries)} | {name: environment[name] for name in ("MALLOC_CONF",) if name in environment}


def _trial(environment: Mapping[str, str]) -> str:
    """Why a process of this environment has no jemalloc; "" if it has. A build for other page sizes kills every process."""
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
