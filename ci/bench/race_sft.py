"""Supervised fine-tuning of SmolLM2-135M on GSM8K, rlcore beside TRL's SFTTrainer: the same rows, completion-only loss, 32 rows
an optimizer step; TRL with its default (padded batches of 8) and with its packing. Ratios above 1: rlcore is faster."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import race
import stack

from rlcore import registry

TARGETS = {("fp32", "padded"): 2.0, ("bf16", "padded"): 2.5, ("fp32", "packed"): 1.1, ("bf16", "packed"): 1.3}
ROWS_PER_STEP, LENGTH = 32, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=5, help="of 32 rows; the first is not counted")
    options = parser.parse_args()
    source = race.PEERS.parent / "data" / "gsm8k" / "train.jsonl"
    if not source.is_file():
        sys.exit(f"skipped: {source} is not here")
    if race.importlib.util.find_spec("trl") is None:
        sys.exit("skipped: trl is not installed; pip install --no-deps -r requirements/bench.txt")
    kind = registry.load("backends", "cpu")
    if options.precision == "bf16" and kind(kind.Options()).default_precision() == "fp32":
        sys.exit("skipped: no bf16 instructions on this processor")
    model = stack.smollm2_folder()
    with tempfile.TemporaryDirectory(prefix="rlcore-bench-") as folder:
        rows = write(Path(folder, "rows.jsonl"), source, ROWS_PER_STEP * options.steps)
        seconds = {layout: theirs(rows, model, options.precision, layout) for layout in ("padded", "packed")}
        own = ours(rows, model, options, Path(folder))
    print(f"rlcore           {own:7.3f} s for 32 rows")
    for layout, took in seconds.items():
        target = TARGETS[options.precision, layout]
        print(f"TRL, {layout}      {took:7.3f} s for 32 rows, {took / own:5.2f} times rlcore's (target {target})")


def write(path: Path, source: Path, count: int) -> Path:
    lines = source.read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    roles = {"prompt": ("user", "question"), "completion": ("assistant", "answer")}
    chats = [{part: [{"role": role, "content": row[name]}] for part, (role, name) in roles.items()} for row in rows]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    return path


def theirs(rows: Path, model: Path, precision: str, layout: str) -> float:
    """Seconds for 32 rows: the mean over all optimizer steps but the first."""
    arguments = [str(race.HERE / "peer_sft.py"), str(rows), str(model), precision, layout]
    return statistics.fmean(step["all"] * ROWS_PER_STEP / step["rows"] for step in race.run(f"TRL {layout}", arguments, {}))


def ours(rows: Path, model: Path, options: argparse.Namespace, folder: Path) -> float:
    messages = folder / "messages.jsonl"
    chats = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    messages.write_text("".join(json.dumps({"messages": chat["prompt"] + chat["completion"]}) + "\n" for chat in chats))
    settings = {
        "model": {"path": str(model), "precision": options.precision},
        "data": {
            "train": {"path": str(messages), "options": {"messages": "messages", "answer": None}}, "max_prompt_tokens": LENGTH,
        },
        "rollout": {"max_new_tokens": 1}, "train": {"max_tokens_per_microbatch": 2 * LENGTH},
        "sft": {"epochs": 1, "rows_per_step": ROWS_PER_STEP}, "logging": {"tensorboard": False},
    }  # fmt: skip
    file, run = folder / "run.yaml", folder / "run"
    file.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "rlcore", "sft", str(file), "--backend", "cpu", "--run-dir", str(run)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.fmean(step["timing/all"] for step in steps[1:])


if __name__ == "__main__":
    main()
