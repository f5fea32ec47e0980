"""Group Relative Policy Optimization (Shao et al., DeepSeekMath, arXiv 2402.03300), with the separate clip widths of DAPO (Yu
et al., arXiv 2503.14476)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms.comparison import centred
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.types import AdvantageInputs, TokenView


def advantages(inputs: AdvantageInputs, config: AlgorithmConfig) -> Tensor:
    """[S] float64: each reward relative to the valid rewards of its group, over their standard deviation. 0 where invalid, and
    in groups without spread or with one valid sample."""
    rewards = inputs.penalized
    result = torch.zeros_like(rewards)
    for members in inputs.compared():
        relative = centred(rewards[members])
        if config.advantage_std != "none" and len(relative) > 1:
            relative /= rewards[members].std(correction=config.advantage_std == "sample") + config.advantage_eps
        result[members] = relative
    return result


def surrogate(log_ratio: Tensor, tokens: TokenView, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """log_ratio [M] of new to old policy -> the clipped surrogate [M], and [M] bool where the clip removed the gradient."""
    assert tokens.advantages is not None, "a policy loss is of a batch with advantages"
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    unclipped_loss, clipped_loss = -tokens.advantages * ratio, -tokens.advantages * clipped
    return torch.maximum(unclipped_loss, clipped_loss), clipped_loss > unclipped_loss
