"""Token advantages from response rewards."""

from __future__ import annotations

from torch import Tensor

from rlcore.algorithms import grpo, ppo, reinforce_pp, rloo
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.types import AdvantageInputs


def advantages(inputs: AdvantageInputs, config: AlgorithmConfig) -> tuple[Tensor, Tensor | None]:
    """[N] advantages, and [N] returns for the critic where there is one; computed in float64, returned as float32."""
    if config.advantage == "gae":
        values, returns = ppo.advantages(inputs, config)
        return values.float(), returns.float()
    if config.advantage == "batch":
        return reinforce_pp.advantages(inputs).float(), None
    if config.advantage == "batch_over_group":
        return reinforce_pp.advantages_over_baseline(inputs).float(), None
    by_sample = rloo.advantages(inputs) if config.advantage == "leave_one_out" else grpo.advantages(inputs, config)
    return by_sample[inputs.sequence].float(), None
