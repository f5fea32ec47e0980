"""Checkpoints of SmolLM2-135M in fp32 with its moments, from two FSDP ranks: how long training waits, until the tensors are
copied, compared with until the checkpoint is whole; growth of a process's memory."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import stack
from update import batch_of

from rlcore import registry
from rlcore.config.schema import RunConfig

TARGET, RANKS = 0.2, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    stack.start()
    settings = {
        "model": {"path": "smollm2", "precision": "fp32"}, "data": {"train": {"name": "arithmetic"}, "max_prompt_tokens": 64},
        "rollout": {"engine": "torch"}, "backend": {"name": "cpu"}, "placement": {"kind": "ray", "devices": RANKS},
    }  # fmt: skip

    from rlcore_backends.ray import pools as ray_pools

    from rlcore.checkpoint.saver import Saver
    from rlcore.model.resolved import ResolvedModel
    from rlcore.runtime.pool import results
    from rlcore.runtime.watchdog import Watchdog

    ray_pools.Process = measured(ray_pools.Process)
    kind = registry.load("backends", "cpu")
    resolved = ResolvedModel(RunConfig.model_validate(settings), kind(kind.Options()))
    with ray_pools.open_pools(resolved, Watchdog(0, Path())) as placement, tempfile.TemporaryDirectory() as folder:
        placement.load("grpo")
        placement.actor.update(batch_of(2, 2, 45, 64))  # allocates the moments

        def resident() -> float:
            sizes = [member.ask(ray_pools.Process.resident) for member in placement.pools[0].members]
            return max(results(sizes)) / 1e6

        before = most = resident()
        copied, whole = list[float](), list[float]()
        for number in range(repeats):
            with Saver(Path(folder), placement.actor, keep=1) as saver:
                start = time.perf_counter()
                saver.save(f"step_{number:06d}", {})
                saver.commit()
                copied.append(time.perf_counter() - start)
                most = resident()
                saver.wait()
                whole.append(time.perf_counter() - start)
        files = [path for path in Path(folder).rglob("*.safetensors")]
        size, blocked, total = sum(path.stat().st_size for path in files), statistics.median(copied), statistics.median(whole)
        print(f"{size / 1e6:.0f} MB in {len(files)} files: whole after {total:.2f} s, training waits {blocked:.2f} s,"
              f" {blocked / total:.0%} (target {TARGET:.0%})")  # fmt: skip
        print(f"a process grows by {most - before:.0f} MB while it writes, {resident() - before:.0f} MB afterwards")


def measured(process: type) -> type:
    """The worker process class with its memory."""

    class Measured(process):
        def resident(self) -> int:
            """Bytes."""
            status = Path("/proc/self/status").read_text()
            return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    return Measured


if __name__ == "__main__":
    main()
