"""ruff and pyright report nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def said(*program: str) -> str:
    """Output of a failing program, else an empty string."""
    result = subprocess.run([sys.executable, "-m", *program], cwd=ROOT, capture_output=True, text=True, check=False)
    return "" if result.returncode == 0 else result.stdout[-4000:] + result.stderr[-4000:]


def test_ruff_is_content():
    assert said("ruff", "check", "--quiet", ".") == ""


@pytest.mark.skipif(shutil.which("node") is None, reason="pyright runs on node, which is not here")
def test_pyright_is_content():
    assert said("pyright", "--pythonpath", sys.executable) == ""
