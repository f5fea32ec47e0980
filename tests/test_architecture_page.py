"""The walks of docs/architecture.md name existing functions, and its layers are the tested ones."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from test_packages import CORE

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(\w+(?:\.\w+)?)`(?:\s+and `(\w+\.\w+)`[^(`]*)?,?\s+\(?`((?:rlcore|backends|adapters)/[\w/]+\.py)`")
PASSED = [(name, path) for first, second, path in NAMED.findall(PAGE) for name in (first, second) if name]


def defined(path: str) -> set[str]:
    """Functions and classes of a file, and its methods with and without class name."""
    names = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = {one.name for one in node.body if isinstance(one, ast.FunctionDef)}
            names |= methods | {f"{node.name}.{method}" for method in methods}
    return names


@pytest.mark.parametrize(("name", "path"), sorted(set(PASSED)))
def test_what_a_walk_passes_is_there(name, path):
    assert name in defined(path)


def test_the_walks_are_read():
    assert len(PASSED) > 25


def test_the_table_has_every_package():
    floors = [line.split("|")[2] for line in PAGE.splitlines() if re.match(r"\| \d+ \|", line)]
    named = [name for floor in floors for name in re.findall(r"`(\w+)`", floor)]
    assert sorted(named) == sorted(name for floor in CORE for name in floor if name != "__main__")
