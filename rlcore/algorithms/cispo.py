"""Clipped importance-sampling weights (MiniMax-M1, arXiv 2506.13585): the weight is clipped, no token loses its gradient."""

from __future__ import annotations

from torch import Tensor

from rlcore.config.algorithm import AlgorithmConfig
from rlcore.types import TokenView


def surrogate(log_ratio: Tensor, tokens: TokenView, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """[M] -sg(clipped ratio) x advantage x log p, and [M] bool where the ratio was clipped."""
    assert tokens.advantages is not None, "a policy loss is of a batch with advantages"
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return -weight * tokens.advantages * tokens.logprobs, weight != ratio
