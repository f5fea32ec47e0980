"""REINFORCE++ (Hu et al., arXiv 2501.03262): no critic; advantages are normalized over the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms.comparison import centred
from rlcore.types import AdvantageInputs


def advantages(inputs: AdvantageInputs) -> Tensor:
    """[N] float64: the reward minus the KL penalties from this token on, normalized over the batch's valid tokens."""
    return normalized(inputs.rewards[inputs.sequence] - _from_here_on(inputs), inputs)


def advantages_over_baseline(inputs: AdvantageInputs) -> Tensor:
    """[N] float64: `advantages` of rewards minus their group's mean (REINFORCE++-baseline)."""
    rewards = torch.zeros_like(inputs.rewards)
    for members in inputs.compared():
        rewards[members] = centred(inputs.rewards[members])
    return normalized(rewards[inputs.sequence] - _from_here_on(inputs), inputs)


def normalized(values: Tensor, inputs: AdvantageInputs) -> Tensor:
    """[N] -> [N] float64: mean 0 and deviation 1 (ddof 0) over valid tokens, 0 on the others and where all are equal."""
    valid = inputs.valid[inputs.sequence]
    result = torch.zeros_like(values)
    if valid.any():
        result[valid] = centred(values[valid]) / values[valid].std(correction=0).clamp(min=1e-8)
    return result


def _from_here_on(inputs: AdvantageInputs) -> Tensor:
    """[N] float64: the sum of penalties from each token to the end of its response."""
    running = inputs.penalties.cumsum(0)
    ends = inputs.lengths.cumsum(0)[inputs.sequence] - 1
    return running[ends] - running + inputs.penalties
