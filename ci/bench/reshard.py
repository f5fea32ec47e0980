"""Weight sync of SmolLM2-135M in fp32 from two FSDP ranks into each one's vLLM engine: against copying the same bytes once,
into new or existing memory, and the extra peak memory."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import stack

from rlcore import registry
from rlcore.config.schema import RunConfig

TARGET, RANKS = 3.0, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=512)
    options = parser.parse_args()
    stack.start()
    settings = {
        "model": {"path": "smollm2"}, "data": {"train": {"name": "arithmetic"}, "max_prompt_tokens": 64},
        "rollout": {"engine": "vllm", "max_new_tokens": 64}, "backend": {"name": "cpu"},
        "placement": {"kind": "ray", "devices": RANKS}, "sharding": {"bucket_mib": options.bucket_mib},
    }  # fmt: skip

    from rlcore_backends.ray import pools as ray_pools

    from rlcore.model.resolved import ResolvedModel
    from rlcore.runtime.pool import results
    from rlcore.runtime.watchdog import Watchdog

    ray_pools.Process = measured(ray_pools.Process)
    kind = registry.load("backends", "cpu")
    resolved = ResolvedModel(RunConfig.model_validate(settings), kind(kind.Options()))
    with ray_pools.open_pools(resolved, Watchdog(0, Path())) as placement:
        placement.load("grpo")
        placement.start_engines()
        members = placement.pools[0].members
        times = {}
        for what in ("copied", "copied over", "gathered", "resharded"):
            rounds = [results([member.ask(ray_pools.Process.take, what) for member in members]) for _ in range(options.repeats)]
            times[what] = statistics.median(max(one[0] for one in ranks) for ranks in rounds)
            size, grown = rounds[0][0][1], max(one[2] for ranks in rounds for one in ranks)
            rate = size / times[what] / 1e9
            print(f"{what:12} {times[what]:6.3f} s, {rate:5.1f} GB/s, a process grew by {grown / 1e6:4.0f} MB")
        print(f"{size / 1e6:.0f} MB; checks took {rounds[-1][0][3]:.3f} s of the last")
        for copy in ("copied", "copied over"):
            print(f"{times['resharded'] / times[copy]:.1f} times the time in which they are {copy} (target {TARGET})")


def measured(process: type) -> type:
    """The worker process class with timing added."""

    class Measured(process):
        def take(self, what: str) -> tuple[float, int, int, float]:
            """Seconds, bytes, growth of peak memory in bytes, seconds spent in checks."""
            from rlcore.distributed import fsdp
            from rlcore.runtime.memory import peak_rss

            before, checks = peak_rss(), 0.0
            named = self.worker.actor.model.named_parameters() if what.startswith("copied") else ()
            whole = [weight.clone() for _, weight in fsdp.gathered(named)]
            there = [weight.clone() for weight in whole] if what == "copied over" else []
            start = time.perf_counter()
            if what == "copied":
                there += [weight.clone() for weight in whole]
            elif what == "copied over":
                for new, old in zip(whole, there, strict=True):
                    old.copy_(new)
            elif what == "gathered":
                for _ in self.worker.actor.weights():
                    pass
            else:
                checks = self.worker.sync(int(self.worker.now())).check_seconds
            taken = time.perf_counter() - start
            size = sum(weight.numel() * weight.element_size() for weight in self.worker.actor.model.parameters())
            return taken, size, peak_rss() - before, checks

    return Measured


if __name__ == "__main__":
    main()
