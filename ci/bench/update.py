"""One update of SmolLM2-135M against the time of its useful matmuls alone (bounds.py), its peak memory, and the cost of
packing and bookkeeping at 1,024 samples."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import bounds
import numpy as np
import stack

from rlcore.config.algorithm import AlgorithmConfig
from rlcore.config.sections import OptimizerConfig
from rlcore.model.loaded import LoadedModel

SHAPES = {"short": (8, 8, 45, 64), "long": (4, 16, 256, 64)}  # prompts, samples each, prompt tokens, max response tokens
BOUNDS, BOOKKEEPING = {"fp32": 1.3, "bf16": 1.6}, 0.02  # the targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="short")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--profile", action="store_true", help="one more update, by operator")
    options = parser.parse_args()
    stack.start()

    import torch

    from rlcore.algorithms.loss import objective
    from rlcore.algorithms.schedule import MinibatchSchedule
    from rlcore.model.actor import TorchActor
    from rlcore.model.forward import ForwardSettings
    from rlcore.runtime.memory import peak_rss

    folder, family = stack.smollm2()
    prompts, samples, prompt, response = SHAPES[options.shape]
    batch = batch_of(prompts, samples, prompt, response)
    dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16
    settings = ForwardSettings(torch.device("cpu"), dtype, options.max_tokens, 1.0)
    goal = objective(AlgorithmConfig(), response)
    model = stack.backend().fuse(family.load(folder, torch.float32))
    actor = TorchActor(LoadedModel(model, family), settings, goal, OptimizerConfig(), MinibatchSchedule(total_steps=9))
    bound = 3 * bounds.forward_flops(actor.model, batch.groups) / bounds.rate(actor.model, dtype)
    actor.update(batch)  # allocates the optimizer's moments
    times = [timed(lambda: actor.update(batch)) for _ in range(options.repeats)]
    took = statistics.median(times)
    print(f"{prompts} prompts of {prompt} tokens x {samples} responses of up to {response}, rows of {options.max_tokens}")
    target = BOUNDS[options.precision]
    print(f"update {took:.2f} s, its matrix products {bound:.2f} s, {took / bound:.2f} times (target {target})")
    print(f"peak memory {peak_rss() / 2**30:.1f} GiB")
    large = batch_of(128, 8, prompt, response)
    overhead = timed(lambda: bookkeeping(large, options.max_tokens))
    share = overhead / (took * len(large.samples) / len(batch.samples))
    print(f"packing and bookkeeping of 1,024 samples {overhead:.2f} s, {share:.2%} of their update (target {BOOKKEEPING:.0%})")
    if options.profile:
        with torch.profiler.profile() as profile:
            actor.update(batch)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


def batch_of(prompts: int, samples: int, prompt: int, response: int, words: int = 40_000) -> Any:
    """Random tokens; response lengths from a third of the limit up to the limit."""
    import torch

    from rlcore.types import Batch, Group, Prompt, Row, Sample

    torch.manual_seed(0)
    groups = []
    for number in range(prompts):
        ids = torch.randint(1000, words, (prompt,)).tolist()
        lengths = torch.randint(response // 3, response + 1, (samples,)).tolist()
        responses = [torch.randint(1000, words, (length,)).numpy() for length in lengths]
        drawn = [Sample(tokens, np.full(len(tokens), -1, np.float32), "", "length", 0) for tokens in responses]
        groups.append(Group(Prompt(Row(str(number), []), ids, ids), drawn))
    batch = Batch.of(groups)
    return replace(batch, advantages=batch.per_token(torch.randn(prompts * samples)))


def bookkeeping(batch: Any, cap: int) -> None:
    """An update without the model: tensors, advantages, loss weights, packed rows, and the loss of given log-probs."""
    import torch

    from rlcore.algorithms.advantages import advantages
    from rlcore.algorithms.loss import objective
    from rlcore.model.actor import _view
    from rlcore.model.packing import microbatches
    from rlcore.types import AdvantageInputs, Batch

    config = AlgorithmConfig()
    goal = objective(config, 64)
    batch = Batch.of(batch.groups)
    count = len(batch.samples)
    groups = torch.arange(len(batch.groups)).repeat_interleave(count // len(batch.groups))
    scores, valid = torch.rand(count), torch.ones(count, dtype=torch.bool)
    values, _ = advantages(AdvantageInputs(scores, valid, groups, batch.lengths, torch.zeros(len(batch.loss_mask))), config)
    batch = replace(batch, advantages=values)
    shares = goal.loss_weights(batch)
    for packed in microbatches(batch, cap):
        logprobs = torch.full((len(packed.index),), -1.0, requires_grad=True)
        result = goal.loss(_view(batch, packed.index, logprobs, torch.zeros(len(packed.index))))
        (result.loss * shares[packed.index]).sum().backward()


def timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
