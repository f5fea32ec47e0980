"""Start of a run on two FSDP ranks with a vLLM engine each, and its second start after a rank was killed: seconds from the
command, or from the death, until everything has loaded."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    settings = {
        "model": {"path": "smollm2"}, "data": {"train": {"name": "arithmetic"}, "max_prompt_tokens": 64},
        "rollout": {"engine": "vllm", "max_new_tokens": 8}, "reward": [{"name": "math"}], "algorithm": {"group_size": 2},
        "backend": {"name": "cpu", "options": {"kv_cache_gib": 0.2}},
        "placement": {"kind": "ray", "devices": 2, "max_restarts": 1},
        "train": {"steps": 3, "prompts_per_step": 2, "save_every": 1, "keep_last": 1},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as base:
        file, folder = Path(base) / "run.yaml", Path(base) / "run"
        file.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "rlcore", "grpo", str(file), "--run-dir", str(folder)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
            while not (folder / "checkpoints" / "latest").exists():
                assert run.poll() is None, "the run ended before its first checkpoint"
                time.sleep(0.1)
            below = psutil.Process(run.pid).children(recursive=True)
            next(one for one in below if "ray::Process" in " ".join(one.cmdline())).kill()
            assert run.wait() == 0
        history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        first, second = (line["loading_seconds"] for line in history if "loading_seconds" in line)
    print(f"first start {first:.1f} s, second {second:.1f} s, {second / first:.0%} (target: below 100%)")


if __name__ == "__main__":
    main()
