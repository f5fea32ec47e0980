"""REINFORCE++ (Hu et al., arXiv 2501.03262): no critic; advantages are normalized over the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms.comparison import centred
from rlcore.types import Outcome


def advantages(outcome: Outcome) -> Tensor:
    """[N] float64: the reward less the divergence penalties from this token on, normalized over the batch's valid tokens."""
    return normalized(outcome.rewards[outcome.sequence] - _from_here_on(outcome), outcome)


def advantages_over_baseline(outcome: Outcome) -> Tensor:
    """[N] float64: the same of rewards less their group's mean (REINFORCE++-baseline)."""
    rewards = torch.zeros_like(outcome.rewards)
    for members in outcome.compared():
        rewards[members] = centred(outcome.rewards[members])
    return normalized(rewards[outcome.sequence] - _from_here_on(outcome), outcome)


def normalized(values: Tensor, outcome: Outcome) -> Tensor:
    """[N] -> [N] float64: mean 0 and deviation 1 (ddof 0) over valid tokens, 0 on the others and where all are equal."""
    valid = outcome.valid[outcome.sequence]
    result = torch.zeros_like(values)
    if valid.any():
        result[valid] = centred(values[valid]) / values[valid].std(correction=0).clamp(min=1e-8)
    return result


def _from_here_on(outcome: Outcome) -> Tensor:
    """[N] float64: the penalties of each response from a token to its end."""
    running = outcome.penalties.cumsum(0)
    ends = outcome.lengths.cumsum(0)[outcome.sequence] - 1
    return running[ends] - running + outcome.penalties
