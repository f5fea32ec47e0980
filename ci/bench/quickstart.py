"""A new user's first two commands, `make setup` and `make quickstart`, timed and checked in a fresh clone."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parents[2]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "rlcore")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        installing = timed(clone, "setup")
        training = timed(clone, "quickstart")
        (metrics,) = clone.glob("runs/*/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    scores = [row["grpo/score/mean"] for row in rows if row["step"]]
    held_out = [row["eval/score"] for row in rows if "eval/score" in row]
    judge("installing and training, seconds", installing + training, 300, most=True)
    judge("training alone, seconds", training, 120, most=True)
    judge("mean score of the first three steps", fmean(scores[:3]), 0.45, most=True)
    judge("mean score of the last five steps", fmean(scores[-5:]), 0.85, most=False)
    judge("held-out figures, after", held_out[-1], 0.85, most=False)
    print(f"held-out figures, before: {held_out[0]:.3f}")


def timed(clone: Path, target: str) -> float:
    started = time.perf_counter()
    subprocess.run(["make", target, f"PYTHON={sys.executable}"], cwd=clone, stdout=sys.stderr, check=True)
    return time.perf_counter() - started


def judge(what: str, value: float, target: float, most: bool) -> None:
    met = value <= target if most else value >= target
    print(f"{what}: {value:.3g} (target: at {'most' if most else 'least'} {target:g}) {'met' if met else 'MISSED'}")


if __name__ == "__main__":
    main()
