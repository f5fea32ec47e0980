"""Runs killed at random moments come to what a run left alone comes to; `make reliability` kills more of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "ci" / "reliability.py"


@pytest.mark.parametrize("engine, kills", [("torch", "6"), ("vllm", "1")])
def test_killed_runs_come_to_the_same(engine, kills):
    command = [sys.executable, PROGRAM, "--engine", engine, "--kills", kills]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^\d+ kills of \d+ runs of .* all equal to the run left alone\n", result.stdout, re.MULTILINE)
