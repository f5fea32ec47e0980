"""From what responses earned to the advantage of each of their tokens."""

from __future__ import annotations

from torch import Tensor

from rlcore.algorithms import grpo, ppo, reinforce_pp, rloo
from rlcore.config import AlgorithmConfig
from rlcore.types import Outcome


def advantages(outcome: Outcome, config: AlgorithmConfig) -> tuple[Tensor, Tensor | None]:
    """[N] advantages, and [N] returns for the critic where there is one."""
    if config.advantage == "gae":
        return ppo.advantages(outcome, config)
    if config.advantage == "batch":
        return reinforce_pp.advantages(outcome), None
    if config.advantage == "batch_over_group":
        return reinforce_pp.advantages_over_baseline(outcome), None
    by_sample = rloo.advantages(outcome) if config.advantage == "leave_one_out" else grpo.advantages(outcome, config)
    return by_sample[outcome.sequence], None
