"""SmolLM2-135M in fp32 in vLLM: 8 samples of each of 8 prompts, up to 64 tokens each, from a server and from the engine in this
process in turn; and an update of all its weights, against copying their bytes once into new memory."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import stack

SAMPLING_TARGET, UPDATE_TARGET = 1.15, 3.0
ENGINES = {"vllm": "in process", "vllm_server": "server"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    stack.start()

    import torch
    from rlcore_adapters.datasets.arithmetic import arithmetic

    folder, family = stack.smollm2()
    engines = {engine: build(engine, folder, family, torch.float32) for engine in ENGINES}
    prompts = [family.encode(row) for row in arithmetic(count=8, instruction="Explain in detail how you find the result.")]
    speeds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for seed in range(options.repeats + 1):  # the first is not counted
        for engine, rollout in engines.items():
            speeds[engine].append(tokens_a_second(rollout, prompts, seed))
    inside, outside = (statistics.median(speeds[engine][1:]) for engine in ENGINES)
    for engine, speed in zip(ENGINES, (inside, outside), strict=True):
        print(f"{ENGINES[engine]:12} {speed:7.0f} tokens/s")
    print(f"the server takes {inside / outside:.2f} times as long a token (target {SAMPLING_TARGET})")

    weights = list(family.load(folder, torch.float32).named_parameters())
    copies, updates = [], []
    for version in range(1, options.repeats + 2):
        began = time.perf_counter()
        kept = [weight.detach().clone() for _, weight in weights]
        copies.append(time.perf_counter() - began)
        del kept
        updates.append(engines["vllm_server"].load_weights(weights, version).seconds)
    copied, updated = (statistics.median(times[1:]) for times in (copies, updates))
    size = sum(weight.nbytes for _, weight in weights)
    print(f"an update of {size / 1e6:.0f} MB takes {updated:.2f} s")
    print(f"a copy takes {copied:.2f} s: {updated / copied:.1f} times (target {UPDATE_TARGET})")


def build(engine: str, folder: Any, family: Any, dtype: Any) -> Any:
    from rlcore import registry
    from rlcore.config.sections import RolloutConfig

    return registry.load("rollout_engines", engine)(
        family=family, folder=folder, backend=stack.backend(), config=RolloutConfig(engine=engine), dtype=dtype, max_tokens=192,
        seed=0,
    )  # fmt: skip


def tokens_a_second(rollout: Any, prompts: Any, seed: int) -> float:
    from rlcore.types import Sampling

    began = time.perf_counter()
    groups = rollout.generate(prompts, Sampling(samples=8, max_new_tokens=64, seed=seed))
    tokens = sum(len(sample.token_ids) for group in groups for sample in group.samples)
    return tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
