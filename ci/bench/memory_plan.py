"""The memory plan of a GRPO run of SmolLM2-135M in fp32 with vLLM in one process, against the peak memory of that run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import stack
import yaml

TARGET = 0.15
RUN = {
    "model": {"path": "smollm2", "precision": "fp32"},
    "backend": {"name": "cpu", "options": {"kv_cache_gib": 0.5}},
    "data": {"train": {"name": "arithmetic", "options": {"count": 64, "max_value": 9}}, "max_prompt_tokens": 64},
    "rollout": {"max_new_tokens": 64},
    "reward": [{"name": "math"}],
    "algorithm": {"group_size": 8, "kl_coef": 0.01},
    "train": {"steps": 2, "prompts_per_step": 6, "max_tokens_per_microbatch": 1024},
    "logging": {"tensorboard": False, "samples_on_console": 0},
}  # fmt: skip


def main() -> None:
    stack.start()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.yaml")
        file.write_text(yaml.safe_dump(RUN), encoding="utf-8")
        predicted = plan(file)
        for malloc, variables in {"C library": {}, "pages returned": {"MALLOC_MMAP_THRESHOLD_": "131072"}}.items():
            report(malloc, predicted[bool(variables)], measured(file, Path(folder, malloc), variables))


def plan(file: Path) -> dict[bool, float]:
    """Predicted peak, GiB: by whether malloc returns what is freed."""
    from dataclasses import replace

    from rlcore.config import loader
    from rlcore.plan import batches
    from rlcore.plan.planner import MemoryPlanner

    backend, config = stack.backend(), loader.load(file, [])
    kind = type(backend)
    backend = kind(loader.validate(kind.Options, config.backend.options, "backend.options."))
    planner = MemoryPlanner(backend, batches.some(batches.read(config, backend)[0]), None)
    geometry, facts = planner.geometry(config), planner.facts(config, backend)
    peaks = {}
    for returned in (False, True):
        (pool,) = planner.plan(config, geometry, replace(facts, keeps=not returned))
        peaks[returned] = pool.peak.total / 2**30
    return peaks


def measured(file: Path, folder: Path, variables: dict[str, str]) -> float:
    command = [sys.executable, "-m", "rlcore", "grpo", str(file), "--run-dir", str(folder)]
    subprocess.run(command, env=os.environ | variables, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])["memory/peak_rss_gib"]


def report(malloc: str, predicted: float, found: float) -> None:
    print(f"{malloc}: predicted {predicted:.2f} GiB, measured {found:.2f}, {predicted / found - 1:+.1%} (target {TARGET:.0%})")


if __name__ == "__main__":
    main()
