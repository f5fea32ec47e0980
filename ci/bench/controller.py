"""Controller overhead per step: pickling, unpickling, building tensors and splitting a batch across ranks, plus one rank's
packing of its part, at 512 prompts x 8 samples x 2,048 tokens (8.4 million response tokens)."""

from __future__ import annotations

import argparse
import pickle
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

TARGET = 0.5  # seconds, each
RANKS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--response-tokens", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=32_768, help="of a micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    import torch

    from rlcore.model.packing import deal, microbatches
    from rlcore.types import Batch

    groups = responses(options.prompts, options.samples, options.prompt_tokens, options.response_tokens)
    batch = Batch.of(groups)
    batch = replace(batch, advantages=batch.per_token(torch.randn(len(batch.lengths))), ref_logprobs=batch.rollout_logprobs)
    sent = pickle.dumps(groups, protocol=5)
    part, _ = deal(batch, RANKS, options.max_tokens)[0]
    work: dict[str, Callable[[], Any]] = {
        "pickling the groups": lambda: pickle.dumps(groups, protocol=5),
        "unpickling them": lambda: pickle.loads(sent),
        "a batch of them": lambda: Batch.of(groups),
        f"dealing it to {RANKS} ranks": lambda: deal(batch, RANKS, options.max_tokens),
        f"packing one of {RANKS} ranks' rows": lambda: microbatches(part, options.max_tokens),
    }
    print(f"{len(batch.samples)} samples, {len(batch.loss_mask):,} response tokens, {len(sent) / 1e6:.0f} MB; on {processor()}")
    for name, call in work.items():
        took = statistics.median(timed(call) for _ in range(options.repeats))
        print(f"{name:30} {took:6.3f} s ({'met' if took <= TARGET else 'missed'}: at most {TARGET} s)")


def responses(prompts: int, samples: int, prompt: int, response: int) -> list[Any]:
    """Groups of random tokens, all responses of maximum length."""
    from rlcore.types import Group, Prompt, Row, Sample

    random = np.random.default_rng(0)

    def sample() -> Sample:
        logprobs = -random.random(response, dtype=np.float32)
        return Sample(random.integers(1000, 150_000, response, dtype=np.int32), logprobs, "", "length", 0)

    groups = []
    for number in range(prompts):
        ids = random.integers(1000, 150_000, prompt).tolist()
        groups.append(Group(Prompt(Row(str(number), []), ids, ids), [sample() for _ in range(samples)]))
    return groups


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def processor() -> str:
    from pathlib import Path

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "an unnamed processor")


if __name__ == "__main__":
    main()
