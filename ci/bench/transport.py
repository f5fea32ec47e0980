"""Traffic between the controller and two Ray workers in a step of 128 prompts x 8 samples with images: bytes and seconds,
when each call sends all its data, and as placements do it (shared objects). Workers unpickle and pack; no model runs."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import stack
from controller import processor, responses

RANKS, CAP = 2, 32_768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--response-tokens", type=int, default=1024)
    parser.add_argument("--image-tokens", type=int, nargs=2, default=(256, 1024), help="of an image, fewest and most")
    parser.add_argument("--width", type=int, default=2048, help="of an embedding, in bf16")
    options = parser.parse_args()
    stack.start()

    import ray

    ray.init("local", include_dashboard=False, logging_level=logging.ERROR, configure_logging=False)
    stages = {"all with each call": step(options, shared=False), "what is missing": step(options, shared=True)}
    ray.shutdown()
    size = int(image_tokens(options).sum()) * options.width * 2
    print(f"{options.prompts} x {options.samples} samples, {size / 1e6:.0f} MB of embeddings; on {processor()}")
    print(f"{'sent:':16}" + "".join(f"{what:>28}" for what in stages))
    for name in next(iter(stages.values())):
        print(f"{name:16}" + "".join(f"{of[name][0] / 1e6:14.1f} MB {of[name][1]:9.2f} s" for of in stages.values()))


def step(options: argparse.Namespace, shared: bool) -> dict[str, tuple[float, float]]:
    """Bytes and seconds by stage."""
    import torch

    from rlcore.types import Batch, Sampling

    result = {}
    placement, close = placed(shared, options)

    def measured(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = call()
        result[name] = placement.traffic()["placement/bytes"], time.perf_counter() - start
        return value

    def sampled(prompts: Sequence[Any]) -> Any:
        drawn = dict(placement.rollout.stream(prompts, Sampling(options.samples, options.response_tokens)))
        return Batch.of([drawn[place] for place in range(len(prompts))])

    prompts = with_pictures(options)
    placement.traffic()
    prompts = measured("embed", lambda: placement.encoder.embed(prompts))
    batch = measured("generate", lambda: sampled(prompts))
    batch = replace(batch, ref_logprobs=measured("reference", lambda: placement.reference.logprobs(batch)))
    batch = replace(batch, old_logprobs=measured("old log-probs", lambda: placement.actor.logprobs(batch)))
    batch = replace(batch, advantages=batch.per_token(torch.randn(len(batch.lengths))))
    measured("update", lambda: placement.update(batch))
    result["in all"] = tuple(sum(each) for each in zip(*result.values(), strict=True))
    close()
    return result


def placed(shared: bool, options: argparse.Namespace) -> tuple[Any, Callable[[], None]]:
    """A placement of workers that run no model; without `shared` every call sends its data anew."""
    import ray
    from rlcore_backends.ray import pools as ray_pools
    from rlcore_backends.ray import store as ray_store

    from rlcore.config.schema import RunConfig
    from rlcore.runtime.placement import Placement
    from rlcore.runtime.pool import Pool, Store
    from rlcore.runtime.worker import ROLES

    settings = {
        "model": {"path": "smollm2", "freeze": ["vision"]}, "data": {"train": {"name": "geometry_figures"}},
        "algorithm": {"kl_coef": 0.1}, "train": {"max_tokens_per_microbatch": CAP},
    }  # fmt: skip
    store = ray_store.RayStore()
    reader = reading(ray_pools.Process)
    workers: list[Any] = [ray.remote(reader).options(num_cpus=0).remote() for _ in range(RANKS)]
    members = [ray_pools.Remote(worker, f"worker {rank}", store) for rank, worker in enumerate(workers)]
    for member in members:
        member.ask(reader.start, shared, options.response_tokens, options.width).result()
    pool = Pool(members, store=store if shared else Store())
    placement = Placement(RunConfig.model_validate(settings), dict.fromkeys(ROLES, pool), store=store)
    placement.load("grpo")

    def close() -> None:
        for worker in workers:
            ray.kill(worker)

    return placement, close


def reading(process: type) -> type:
    """A worker process that only unpacks its arguments."""
    from rlcore.monitor.heartbeat import Heartbeat

    class Reader:
        def __init__(self, put: Callable[[Any], Any], response: int, width: int) -> None:
            self.put, self.response, self.width = put, response, width

        def now(self) -> float:
            return time.perf_counter()

        def load(self, *_: Any) -> None:
            """Nothing."""

        def embed(self, visions: Sequence[Any]) -> list[Any]:
            import torch

            sizes = [int(vision["image_grid_thw"].prod()) // 4 for vision in visions]
            read = [torch.randn(size, self.width).bfloat16() for size in sizes]
            return [{**vision, "image_embeds": self.put(one)} for vision, one in zip(visions, read, strict=True)]

        def generate(self, part: Any, answers: bool) -> Iterator[Any]:
            prompts, sampling = part
            for place, group in enumerate(responses(len(prompts), sampling.samples, 1, self.response)):
                yield sampling.first + place, group.samples

        def logprobs(self, batch: Any) -> Any:
            from rlcore.model.packing import microbatches

            microbatches(batch, CAP)
            return batch.rollout_logprobs

        reference_logprobs = logprobs

        def update(self, steps: Sequence[Any]) -> list[Any]:
            from rlcore.model.optimizer import StepStatistics

            found = []
            for step in steps:
                self.logprobs(step)
                found.append(StepStatistics())
                found[-1].common = {"grad_norm": 0.0, "lr": 0.0}
            return found

    class Reading(process):
        def start(self, shared: bool, response: int, width: int) -> None:
            self.heartbeat = Heartbeat()
            self.worker = Reader(self.outbox.put if shared else lambda value: value, response, width)

    return Reading


def image_tokens(options: argparse.Namespace) -> Any:
    fewest, most = options.image_tokens
    return np.random.default_rng(0).integers(fewest, most, options.prompts, endpoint=True)


def with_pictures(options: argparse.Namespace) -> list[Any]:
    """Prompts of one image each, by size only: the pixels go to the encoder in any case."""
    import torch

    from rlcore.types import Prompt, Row

    prompts = []
    for number, tokens in enumerate(image_tokens(options).tolist()):
        vision = {"image_grid_thw": torch.tensor([[1, 2, 2 * tokens]])}
        prompts.append(Prompt(Row(str(number), []), [7] * (tokens + 32), [7] * 33, vision))
    return prompts


if __name__ == "__main__":
    main()
