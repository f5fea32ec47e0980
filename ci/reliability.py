"""Kill a run with SIGKILL, again and again, and compare what it comes to with a run that was left alone.

    python ci/reliability.py [--kills 30] [--engine torch|vllm] [--placement local|ray] [--seed 0]

Half of the kills come at a random moment, the others at random moments of sampling, updating and saving. Each killed run
goes on with --resume until it has finished; then metrics.jsonl (without times, memory and traffic), samples.jsonl and the last
checkpoint must equal the other run's byte for byte. Exit status 1 if one does not.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

STAGES = {"anything": (), "sampling": (b"rollout", b"reward"), "updating": (b"update",), "saving": (b"saving",)}
TIMED = re.compile(r"timing/.*|memory/.*|sync/.*seconds|placement/bytes|.*_tps|tps_throughput")
STEPS, EVERY = 6, 2


def settings(engine: str, placement: str) -> dict[str, object]:
    """A run with a reference, an adaptive KL coefficient, several optimizer steps a step, and epochs of five rows."""
    options = {"options": {"kv_cache_gib": 0.2}} if engine == "vllm" else {"options": {"threads": 1}}
    return {
        "model": {"path": "tiny_llama", "options": {"hidden_size": 128, "layers": 2}, "precision": "fp32"},
        "backend": {"name": "cpu", **options},
        "data": {"train": {"name": "arithmetic", "options": {"count": 5, "max_value": 9}}, "max_prompt_tokens": 64},
        "rollout": {"engine": engine, "max_new_tokens": 6}, "reward": [{"name": "reliability.varied"}],
        "algorithm": {"group_size": 4, "kl_coef": 0.1, "kl_target": 0.001, "kl_horizon": 20}, "optimizer": {"lr": 1e-3},
        "placement": {"kind": placement},
        "train": {"steps": STEPS, "prompts_per_step": 2, "minibatches_per_step": 2, "save_every": EVERY,
                  "max_tokens_per_microbatch": 128},
        "logging": {"tensorboard": False, "samples_on_console": 0},
    }  # fmt: skip


def varied(response: str, answer: str, fields: object) -> float:
    return len(set(response)) / 10


class Stage:
    """What the run is doing, as seen by the process that will kill it."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 64)  # inherited by forked processes

    def now(self) -> bytes:
        """Saving goes before what happens beside it."""
        return self._shared[32:64].rstrip(b"\0") or self._shared[:32].rstrip(b"\0")

    def watch(self) -> None:
        """In the run's process: publish its stages from now on."""
        from rlcore.checkpoint.saver import Saver
        from rlcore.monitor.clock import Clock

        real_span, real_finish, shared = Clock.span, Saver._finish, self._shared

        def mark(place: int, stage: bytes) -> None:
            shared[place : place + 32] = stage.ljust(32, b"\0")

        @contextmanager
        def span(clock: Clock, stage: str) -> Iterator[None]:
            before = shared[:32]
            mark(0, stage.encode())
            with real_span(clock, stage):
                yield
            mark(0, before)

        def finish(saver: Saver, *arguments: Any) -> None:
            mark(32, b"saving")
            real_finish(saver, *arguments)
            mark(32, b"")

        Clock.span, Saver._finish = span, finish  # pyright: ignore[reportAttributeAccessIssue]


def started(arguments: Sequence[str], stage: Stage, log: Path) -> int:
    """A process of its own session that runs the command; the modules are imported already."""
    if pid := os.fork():
        return pid
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    from rlcore.cli.main import main

    stage.watch()
    status = 1
    try:
        status = main(arguments)
    finally:
        os._exit(status)


def killed(pid: int, stage: Stage, wanted: Sequence[bytes], seconds: float, draw: random.Random) -> tuple[int | None, str]:
    """Kill the process at a random moment of a stage; returns its exit status if it came first, and the stage."""
    limit, entries = draw.uniform(0, seconds), draw.randint(1, 4)
    began, was, left = time.monotonic(), b"", entries
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), ""
        now = stage.now()
        if wanted:
            left -= now in wanted and now != was
            was = now
            if left <= 0 and now in wanted:
                time.sleep(draw.uniform(0, 0.02))
                break
        elif time.monotonic() - began > limit:
            break
        time.sleep(0.0002)
    last = stage.now().decode() or "between stages"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, last


def outcome(folder: Path) -> dict[str, object]:
    """What must be equal."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = folder / "checkpoints" / f"step_{STEPS:06d}"
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = {name for line in lines for name in line if not TIMED.fullmatch(name)}
    return {
        **{f"metrics.jsonl {name}": [line.get(name) for line in lines] for name in names},
        "samples.jsonl": (folder / "samples.jsonl").read_bytes(),
        **{str(path): (folder / path).read_bytes() for path in files if last in (folder / path).parents},
        "files": [str(path) for path in files],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--engine", choices=("torch", "vllm"), default="torch")
    parser.add_argument("--placement", choices=("local", "ray"), default="local")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, stage = random.Random(options.seed), Stage()
    import rlcore.train.grpo  # noqa: F401  before forking: a start takes a second then, not ten

    where: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as base:
        file, log = Path(base) / "run.yaml", Path(base) / "log"
        file.write_text(yaml.safe_dump(settings(options.engine, options.placement)), encoding="utf-8")
        began = time.monotonic()
        _, status = os.waitpid(started(["grpo", str(file), "--run-dir", f"{base}/whole"], stage, log), 0)
        seconds = time.monotonic() - began
        if status:
            print(log.read_text())
            return 1
        whole, runs = outcome(Path(base) / "whole"), 0
        while where.total() < options.kills:
            folder, runs = Path(base) / f"run_{runs}", runs + 1
            status = None
            while status is None:
                saved = (folder / "checkpoints" / "latest").exists()
                if not saved:
                    shutil.rmtree(folder, ignore_errors=True)
                again = ["--resume"] if saved else []
                pid = started(["grpo", str(file), "--run-dir", str(folder), *again], stage, log)
                wanted = STAGES[draw.choice(["anything", "anything", "anything", "sampling", "updating", "saving"])]
                status, last = killed(pid, stage, wanted, seconds, draw)
                where.update([last] if status is None else [])
            if status:
                print(log.read_text(), f"exit status {status}", sep="\n")
                return 1
            found = outcome(folder)
            if different := [name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)]:
                print(f"run {runs}, seed {options.seed}: {', '.join(sorted(different))}: not as in the run left alone")
                return 1
    landed = ", ".join(f"{count} in {name}" for name, count in where.most_common())
    print(f"{where.total()} kills of {runs} runs of {seconds:.1f} s ({landed}): all equal to the run left alone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
