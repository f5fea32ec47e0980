"""Group Relative Policy Optimization (Shao et al., DeepSeekMath, arXiv 2402.03300), with the token mean over the whole
batch and separate clip widths of DAPO (Yu et al., arXiv 2503.14476)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.config import AlgorithmConfig
from rlcore.types import TokenLoss, TokenView


def advantages(rewards: Tensor, groups: Tensor, valid: Tensor, config: AlgorithmConfig) -> Tensor:
    """rewards [S], groups [S] (the group's number), valid [S] bool -> [S]: each reward relative to the valid rewards of
    its group, over their standard deviation. 0 where invalid, and in groups without spread or with one valid sample."""
    result = torch.zeros_like(rewards)
    for group in groups.unique():
        members = (groups == group) & valid
        if members.sum() < 2:
            continue
        centred = rewards[members] - rewards[members].mean()
        if config.advantage_std != "none":
            centred = centred / (rewards[members].std(correction=config.advantage_std == "sample") + config.advantage_eps)
        result[members] = centred
    return result


def loss(tokens: TokenView, config: AlgorithmConfig) -> TokenLoss:
    """The clipped surrogate, plus kl_coef times the k3 estimate (Schulman, "Approximating KL Divergence"), minus
    entropy_coef times the entropy. Each [M]; the caller sums them over the batch and divides once."""
    old = tokens.logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    log_ratio = tokens.logprobs - old
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    unclipped_loss, clipped_loss = -tokens.advantages * ratio, -tokens.advantages * clipped
    policy_loss = torch.maximum(unclipped_loss, clipped_loss)
    total = policy_loss
    means = {
        "actor/pg_loss": policy_loss,
        "actor/pg_clipfrac": (clipped_loss > unclipped_loss).float(),
        "actor/ppo_kl": -log_ratio,
        "actor/entropy": tokens.entropy,
    }
    if config.kl_coef:
        behind = tokens.ref_logprobs - tokens.logprobs
        divergence = behind.exp() - behind - 1
        total = total + config.kl_coef * divergence
        means["actor/kl_loss"] = divergence
    if config.entropy_coef:
        total = total - config.entropy_coef * tokens.entropy
    gap = old.detach() - tokens.rollout_logprobs
    means["mismatch/mean"] = gap.abs()
    means["mismatch/k3"] = gap.exp() - gap - 1
    return TokenLoss(total, means, maxima={"mismatch/max": gap.abs()})
