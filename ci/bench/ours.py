"""rlcore's side of a race: `python ours.py RUN.yaml STEPS` trains through a placement and trainer.step, as `rlcore grpo`
does, and prints one JSON line per step with the stages of peer_trl.py."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import bounds

from rlcore import registry
from rlcore.config import loader

STAGES = {
    "rollout": "generate", "reward": "score", "adv": "score", "reference_model": "score", "old_log_p": "score",
    "update": "update", "resharding_to_infer": "sync",
}  # fmt: skip


def contains_answer(response: str, answer: str, fields: Mapping[str, Any]) -> float:
    """The reward of trl_smol.py."""
    return float(answer in response)


def sevens(response: str, answer: str, fields: Mapping[str, Any]) -> float:
    """The reward of trl_tiny.py."""
    return response.count("7") / max(1, len(response))


def main(file: str, steps: int) -> None:
    config = loader.load(file)
    kind = registry.load("backends", "cpu")
    backend = kind(kind.Options())
    backend.apply_environment(os.environ)

    from rlcore.data.sources import training_prompts
    from rlcore.model.resolved import ResolvedModel
    from rlcore.monitor.clock import Clock
    from rlcore.rewards.runner import RewardFunctions
    from rlcore.runtime.memory import peak_rss
    from rlcore.runtime.placement import Placement
    from rlcore.runtime.pool import Here, Pool
    from rlcore.runtime.roles import InlineReward
    from rlcore.runtime.signals import Interruption
    from rlcore.runtime.worker import ROLES, Worker
    from rlcore.train import grpo
    from rlcore.train.sampling import Sampler

    with Interruption() as interruption:
        resolved = ResolvedModel(config, backend)
        worker = Worker(resolved)
        placement = Placement(config, dict.fromkeys(ROLES, Pool([Here(worker)])))
        placement.load("grpo")
        placement.start_engines()
        clock = Clock()
        reward = InlineReward(RewardFunctions(config.reward), clock)
        sample = Sampler(placement, reward, training_prompts(config.data, resolved.family, config.seed), config, clock)
        assert worker.actor is not None
        model = worker.actor.model
        speed = bounds.rate(model, resolved.settings.compute_dtype)
        for number in range(1, steps + 1):
            interruption.release()
            start = time.perf_counter()
            iteration = grpo.step(sample, number, config.algorithm.kl_coef, interruption)
            stages = defaultdict[str, float](float, all=time.perf_counter() - start)
            for span in (*clock.take(), *(one for one in placement.spans() if one.stage != "resharding_to_infer")):
                stages[STAGES.get(span.stage, "other")] += span.end - span.start
            groups = iteration.batch.groups
            forward = bounds.forward_flops(model, groups) / speed
            stages["generate bound"], stages["update bound"] = forward, 3 * forward
            stages["score bound"] = forward if worker.reference else 0.0
            stages["peak_gib"] = peak_rss() / 2**30
            stages["response_tokens"] = sum(len(sample.token_ids) for group in groups for sample in group.samples)
            stages["prompt_tokens"] = max(len(group.prompt.token_ids) for group in groups)
            print(json.dumps(stages), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
