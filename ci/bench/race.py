"""Shared by the races: runs each side in its own process and prints the comparison table."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
PEERS = HERE.parents[2] / "shared" / "bench"  # only some checkouts have the peer programs
STAGES = ("generate", "score", "update", "sync", "all")
Steps = list[dict[str, float]]


def check(program: str) -> Path:
    """Path of the peer program; exits with the reason if the race cannot run."""
    path = PEERS / program
    if not path.is_file():
        sys.exit(f"skipped: {path} is not here")
    if importlib.util.find_spec("trl") is None:
        sys.exit("skipped: trl is not installed; pip install --no-deps -r requirements/bench.txt")
    return path


def theirs(program: Path, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Steps:
    """TRL's steps, excluding the first."""
    return run("TRL", [str(HERE / "peer_trl.py"), str(program), *arguments], environment or {})


def ours(settings: Mapping[str, Any], rows: Sequence[Mapping[str, object]], steps: int) -> Steps:
    """rlcore's steps on these rows, excluding the first (engine warm-up)."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file = Path(folder, "run.yaml")
        train = {"path": str(data), "options": {"answer": "answer" if "answer" in rows[0] else None}}
        file.write_text(yaml.safe_dump({**settings, "data": {**settings.get("data", {}), "train": train}}))
        return run("rlcore", [str(HERE / "ours.py"), str(file), str(steps + 1)], {"PYTHONPATH": str(HERE)})


def table(rlcore: Steps, trl: Steps) -> str:
    """Medians by stage, TRL/rlcore ratios (raw and at equal response tokens), and the bounds of bounds.py."""
    lines = [f"{'':10}{'rlcore':>10}{'TRL':>10}{'TRL / rlcore':>15}{'bound':>10}{'rlcore / bound':>16}"]
    for stage in STAGES:
        a, b, bound = _median(rlcore, stage), _median(trl, stage), _median(rlcore, f"{stage} bound")
        ratio = f"{b / a:15.2f}" if a and b else f"{'-':>15}"
        lines.append(f"{stage:10}{a:9.3f}s{b:9.3f}s{ratio}" + (f"{bound:9.3f}s{a / bound:16.2f}" if bound else ""))
    peaks = [max(step["peak_gib"] for step in side) for side in (rlcore, trl)]
    lines.append(f"peak memory of the process, GiB: {peaks[0]:.1f} (sampling engine included) and {peaks[1]:.1f}")
    tokens = [statistics.fmean(step["response_tokens"] for step in side) for side in (rlcore, trl)]
    lines.append(f"response tokens a step: {tokens[0]:.0f} and {tokens[1]:.0f}; longest prompt: "
                 f"{rlcore[0]['prompt_tokens']:.0f} and {trl[0]['prompt_tokens']:.0f}")  # fmt: skip
    ratio = _per_token(trl) / _per_token(rlcore)
    lines.append(f"ms a response token: {1e3 * _per_token(rlcore):.2f} and {1e3 * _per_token(trl):.2f}, ratio {ratio:.2f}")
    return "\n".join(lines)


def _median(steps: Steps, stage: str) -> float:
    return statistics.median(step.get(stage, 0.0) for step in steps)


def _per_token(steps: Steps) -> float:
    return statistics.median(step["all"] / step["response_tokens"] for step in steps)


def run(side: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Steps:
    """The program's JSON lines, except the first."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        )  # fmt: skip
        assert process.stdout is not None
        steps: Steps = []
        for line in process.stdout:
            if line.startswith('{"'):
                steps.append(json.loads(line))
                print(f"  {side} step {len(steps)}: {steps[-1]['all']:.2f} s", file=sys.stderr, flush=True)
        if process.wait():
            errors.seek(0)
            sys.exit(f"{side} failed:\n{errors.read()[-3000:]}")
    return steps[1:]
