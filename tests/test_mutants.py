"""The list of mutants (ci/mutants.py) is complete: each has one place and a test; every package and backend has some."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAST = 60
PACKAGES = [init.parent for root in ("rlcore", "backends", "adapters") for init in ROOT.joinpath(root).glob("*/**/__init__.py")]


def _program():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "ci" / "mutants.py")
    sys.modules["mutants"] = program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


mutants = _program()
MUTANTS = mutants.read()


@cache
def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_each_bug_has_its_place_and_a_test_that_is_there(mutant):
    assert mutant.applied(text(mutant.file)) != text(mutant.file)
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name.partition('[')[0] or 'test_'}\w*\(", text(file), re.MULTILINE), test


def test_there_are_many_some_of_every_package_and_each_is_named_once():
    assert len(MUTANTS) >= LEAST
    assert [bug for bug, count in Counter(mutant.bug for mutant in MUTANTS).items() if count > 1] == []
    assert {str(package.relative_to(ROOT)) for package in PACKAGES} <= {str(Path(mutant.file).parent) for mutant in MUTANTS}


def test_a_copy_imports_itself_and_its_bug_is_caught(tmp_path):
    """Whatever PYTHONPATH is, since tests change it."""
    copy = mutants.Copy(tmp_path)
    file = copy.tree / "backends" / "common" / "environment.py"
    (copy.tree / "tests" / "test_planted.py").write_text(
        "import os, subprocess, sys\nfrom rlcore_backends.common import environment as planted\n\ndef test_here():\n"
        "    program = 'from rlcore_backends.common import environment; print(environment.PLANTED)'\n"
        "    environment = {'PATH': os.environ['PATH']}\n"
        "    said = subprocess.run([sys.executable, '-c', program], env=environment, cwd='/', stdout=-1, check=True).stdout\n"
        "    assert (planted.PLANTED, said) != ('yes', b'yes\\n')\n"
    )
    file.write_text(file.read_text(encoding="utf-8") + "\nPLANTED = 'yes'\n", encoding="utf-8")
    outcome = copy.test(["tests/test_planted.py::test_here"])
    assert (outcome.status, outcome.failed) == (1, "test_planted.py::test_here"), outcome.said
    file.write_text(file.read_text(encoding="utf-8").replace("'yes'", "'no'"), encoding="utf-8")
    assert copy.test(["tests/test_planted.py::test_here"]).status == 0
