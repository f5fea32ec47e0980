"""REINFORCE Leave-One-Out (Ahmadian et al., arXiv 2402.14740)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms.comparison import centred
from rlcore.types import AdvantageInputs


def advantages(inputs: AdvantageInputs) -> Tensor:
    """[S] float64: each reward minus the mean of the other valid rewards of its group; 0 where there is no other."""
    rewards = inputs.penalized
    result = torch.zeros_like(rewards)
    for members in inputs.compared():
        count = int(members.sum())
        if count > 1:
            result[members] = centred(rewards[members]) * count / (count - 1)
    return result
