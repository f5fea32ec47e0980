"""Runs killed at random moments come to what a run left alone comes to; `make reliability` kills more of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "ci" / "reliability.py"


def test_killed_runs_come_to_the_same():
    result = subprocess.run([sys.executable, PROGRAM, "--kills", "6"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.match(r"\d+ kills of \d+ runs of .* all equal to the run left alone\n", result.stdout)
