"""Group Sequence Policy Optimization (Zheng et al., arXiv 2507.18071): one ratio a response, clipped as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms import grpo
from rlcore.algorithms.aggregation import sums
from rlcore.config import AlgorithmConfig
from rlcore.types import TokenView


def surrogate(log_ratio: Tensor, tokens: TokenView, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """GRPO's clipped surrogate with every token's ratio replaced by its response's: the geometric mean of the token ratios.

    Its value is the response's, its gradient flows through each token (GSPO-token, section 4.3 of the paper).
    """
    count = int(tokens.sequence.max()) + 1 if len(tokens.sequence) else 0
    detached = log_ratio.detach()
    lengths = sums(torch.ones_like(detached), tokens.sequence, count)
    means = sums(detached, tokens.sequence, count) / lengths.clamp(min=1)
    return grpo.surrogate(means[tokens.sequence] + log_ratio - detached, tokens, config)
