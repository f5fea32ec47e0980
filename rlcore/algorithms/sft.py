"""Supervised training: the mean negative log-probability of given tokens."""

from __future__ import annotations

from rlcore.types import TokenLoss, TokenView


def negative_log_likelihood(view: TokenView) -> TokenLoss:
    loss = -view.logprobs
    return TokenLoss(loss, {"sft/loss": loss, "sft/entropy": view.entropy})
