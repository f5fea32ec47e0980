"""Corrections for the engine/trainer mismatch: the engine samples with slightly other probabilities than the trainer computes.

All use the ratio trainer / engine of the drawn tokens, under the weights that sampled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms.aggregation import means, sums
from rlcore.config.algorithm import AlgorithmConfig


def correction(gap: Tensor, sequence: Tensor, config: AlgorithmConfig) -> Tensor:
    """gap [M] = log p_trainer - log p_engine, without gradient; sequence [M] -> [M] factors of the policy loss.

    token_tis: the ratio, at most correction_high (truncated importance sampling, Yao et al., "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training", 2025). sequence_tis: that of the whole response's ratio. icepop: the ratio
    where it lies within the limits, else 0 (Ling team, "Every Step Evolves", arXiv 2510.18855). geometric: 1 for responses
    whose geometric mean of token ratios lies within them, else 0 (Liu et al., "When Speed Kills Stability", 2025).
    """
    low, high = config.correction_low, config.correction_high
    if config.correction == "none":
        return torch.ones_like(gap)
    assert low is not None and high is not None, "AlgorithmConfig fills in the limits of each correction"
    if config.correction == "token_tis":
        return gap.exp().clamp(max=high)
    if config.correction == "icepop":
        ratio = gap.exp()
        return ratio.where((ratio >= low) & (ratio <= high), 0)
    if config.correction == "sequence_tis":
        return sums(gap, sequence).exp().clamp(max=high)[sequence]
    ratio = means(gap, sequence).exp()
    return ((ratio >= low) & (ratio <= high)).to(gap.dtype)[sequence]
