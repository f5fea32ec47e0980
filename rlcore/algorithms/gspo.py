"""Group Sequence Policy Optimization (Zheng et al., arXiv 2507.18071): one ratio per response, clipped as a whole."""

from __future__ import annotations

from torch import Tensor

from rlcore.algorithms import grpo
from rlcore.algorithms.aggregation import means
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.types import TokenView


def surrogate(log_ratio: Tensor, tokens: TokenView, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """GRPO's clipped surrogate with every token's ratio replaced by its response's: the geometric mean of the token ratios.

    Its value is the response's, its gradient flows through each token (GSPO-token, section 4.3 of the paper).
    """
    detached = log_ratio.detach()
    by_response = means(detached, tokens.sequence)
    return grpo.surrogate(by_response[tokens.sequence] + log_ratio - detached, tokens, config)
