"""KL divergence from the reference policy: per-token estimators, and the controller of its coefficient."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import Tensor

from rlcore.config.algorithm import AlgorithmConfig


def divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """[M], [M] -> [M]: an estimate of KL(policy || reference) from the drawn token.

    kl is k1, unbiased and of either sign; mse is k2 and low_var_kl is k3 (Schulman, "Approximating KL Divergence", 2020), never
    negative; abs is |k1|. As a loss, only mse has the gradient of the divergence in expectation.
    """
    ahead = logprobs - ref_logprobs
    if estimator == "kl":
        return ahead
    if estimator == "abs":
        return ahead.abs()
    if estimator == "mse":
        return ahead.square() / 2
    return (-ahead).exp() + ahead - 1


@dataclass
class Controller:
    """The coefficient of the divergence: fixed, or moved towards `kl_target` (Ziegler et al., arXiv 1909.08593)."""

    config: AlgorithmConfig
    coefficient: float

    def observe(self, mean_divergence: float, samples: int) -> None:
        """Adjust the coefficient to a step's mean divergence per token. The relative error, clipped to [-0.2, 0.2], counts by
        min(1, samples / kl_horizon): so the coefficient falls by a fifth at most and stays above 0."""
        if self.config.kl_target is not None:
            error = max(-0.2, min(0.2, mean_divergence / self.config.kl_target - 1))
            moved = self.coefficient * (1 + error * min(1.0, samples / self.config.kl_horizon))
            self.coefficient = max(moved, sys.float_info.min)  # from 0 it could not rise again
