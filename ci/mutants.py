"""Mutation tests: applies known bugs one at a time, each to a copy of the tree; exit status 1 if no test catches one.

The bugs are in ci/mutants/*.toml: a description, the file, a text that occurs in it once and its replacement, the tests that
must fail, and `hangs = true` where they may also hang.

    python ci/mutants.py [--list] [--only PATTERN] [--file PATH] [--jobs N]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parents[1]
BUGS = ROOT / "ci" / "mutants"
LIMIT = 120.0  # seconds per test
_FAILED = re.compile(r"^(?:FAILED|ERROR) (?:tests/)?(\S+?::.+?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """A bug, and the tests that catch it."""

    bug: str
    file: str
    old: str
    new: str
    test: str  # pytest ids relative to tests/, separated by spaces
    hangs: bool = False  # a timeout counts as caught

    @property
    def tests(self) -> list[str]:
        return [f"tests/{name}" for name in self.test.split()]

    def applied(self, text: str) -> str:
        """The file's text with the bug applied; ValueError unless `old` occurs exactly once."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} has {count} times {self.old!r}, not once")
        return text.replace(self.old, self.new)


class Outcome(NamedTuple):
    """Result of a test run."""

    status: int | None  # pytest's exit status; None on timeout
    failed: str  # the first failed test
    seconds: float
    said: str


def read() -> list[Mutant]:
    """All mutants, in file order."""
    entries = (entry for file in sorted(BUGS.glob("*.toml")) for entry in tomllib.loads(file.read_text("utf-8"))["mutant"])
    return [Mutant(**entry) for entry in entries]


class Copy:
    """A copy of the tree, with a Python that imports the copy and otherwise this Python's packages."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.tree = folder, folder / "tree"
        for name in _files():
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.tree / name)
        if (beside := ROOT.parent / "shared").exists():
            (folder / "shared").symlink_to(beside)

    @cached_property
    def python(self) -> Path:
        """A separate virtual environment: tests start processes with a PYTHONPATH of their own."""
        venv.create(self._folder / "python", symlinks=True)
        imports = self._folder / "imports"
        imports.mkdir()
        settings = tomllib.loads((self.tree / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
        for name, place in settings["package-dir"].items():
            (imports / name).symlink_to(self.tree / place)
        (packages,) = (self._folder / "python").glob("lib/python*/site-packages")
        installed = [f"import site; site.addsitedir({place!r})" for place in site.getsitepackages()]
        (packages / "copy.pth").write_text("\n".join([str(imports), *installed]), "utf-8")
        python = self._folder / "python" / "bin" / "python"
        program = "".join(f"import {name}; print({name}.__file__);" for name in settings["package-dir"])
        for file in subprocess.run([python, "-c", program], cwd="/", stdout=-1, text=True, check=True).stdout.split():
            assert Path(file).is_relative_to(imports), f"{file} is imported, and not the copy"
        return python

    def test(self, tests: Sequence[str]) -> Outcome:
        """Run the tests, stopping at the first failure."""
        command = [self.python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=short", *tests]
        began, said = time.monotonic(), self._folder / "said"
        with said.open("wb") as output:
            process = subprocess.Popen(command, cwd=self.tree, stdout=output, stderr=output, start_new_session=True)
            try:
                status = process.wait(LIMIT * len(tests))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self._end_orphans()
        text = said.read_text("utf-8", errors="replace")
        found = _FAILED.search(text)
        return Outcome(status, found[1] if found else "", time.monotonic() - began, text)

    def _end_orphans(self) -> None:
        """Kill what still runs with this copy's Python, with its children: some bugs are about processes that stay."""
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [""])[0].startswith(str(self._folder)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    for one in (*process.children(recursive=True), process):
                        one.kill()


def _files() -> list[str]:
    """Tracked files and untracked ones that are not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if (ROOT / name).is_file()]


def _run(tests: Sequence[str], mutant: Mutant | None = None) -> Outcome:
    """Run these tests in a copy with the bug applied."""
    with tempfile.TemporaryDirectory(prefix="rlcore-mutant-", ignore_cleanup_errors=True) as folder:
        copy = Copy(Path(folder))
        if mutant:
            file = copy.tree / mutant.file
            file.write_text(mutant.applied(file.read_text("utf-8")), "utf-8")
        return copy.test(tests)


def sound(mutants: Iterable[Mutant], jobs: int) -> bool:
    """Whether all their tests pass without any bug; one process per test file."""
    files: dict[str, dict[str, None]] = {}
    for test in (test for mutant in mutants for test in mutant.tests):
        files.setdefault(test.partition("::")[0], {})[test] = None
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(_run, map(list, files.values())))
    for file, outcome in zip(files, outcomes, strict=True):
        if outcome.status != 0:
            print(f"{file} fails without any bug: {outcome.failed}\n{outcome.said[-3000:]}")
    return all(outcome.status == 0 for outcome in outcomes)


def verdict(mutant: Mutant) -> tuple[bool, str]:
    """Whether it was caught, and a report line naming the test."""
    outcome = _run(mutant.tests, mutant)
    caught = bool(outcome.failed) or (outcome.status is None and mutant.hangs)
    by = outcome.failed or ("does not end" if outcome.status is None else f"pytest's status {outcome.status}")
    return caught, f"{'caught  ' if caught else 'SURVIVED'} {outcome.seconds:5.1f} s  {mutant.file}: {mutant.bug}  [{by}]"


def verdicts(mutants: Iterable[Mutant], jobs: int) -> Iterator[tuple[bool, str]]:
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(verdict, mutants)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="name them, and plant none")
    parser.add_argument("--only", metavar="PATTERN", default="", help="those whose bug matches this regular expression")
    parser.add_argument("--file", metavar="PATH", default="", help="those of files whose path begins so")
    parser.add_argument("--jobs", metavar="N", type=int, default=2, help="at the same time")
    options = parser.parse_args()
    mutants = [one for one in read() if re.search(options.only, one.bug) and one.file.startswith(options.file)]
    if options.list:
        print("\n".join(f"{one.file}: {one.bug}  [{one.test}]" for one in mutants))
        return 0
    os.environ["PYTEST_XDIST_WORKER_COUNT"] = str(options.jobs)  # tests/conftest.py divides the cores by it
    began = time.monotonic()
    if not sound(mutants, options.jobs):
        return 1
    caught = 0
    for good, line in verdicts(mutants, options.jobs):
        print(line, flush=True)
        caught += good
    print(f"{caught} caught, {len(mutants) - caught} survived, in {time.monotonic() - began:.0f} s")
    return int(caught < len(mutants))


if __name__ == "__main__":
    sys.exit(main())
