"""The objective of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rlcore.types import Batch, TokenLoss, TokenView


@dataclass(frozen=True)
class Objective:
    """The actor's objective: the sum over tokens of loss weight x loss."""

    loss: Callable[[TokenView], TokenLoss]
    loss_weights: Callable[[Batch], Tensor]  # [N], of a whole optimizer step; 0 where the loss does not count
    denominator: Callable[[Batch], float]  # denominator of that step's reported means
    whole_groups: bool = False  # the loss of a sample needs the others of its group in the same forward pass


@dataclass(frozen=True)
class Reduction:
    """Loss weights and denominator of an optimizer step: an `Objective` without its loss."""

    loss_weights: Callable[[Batch], Tensor]
    denominator: Callable[[Batch], float]


def tokens(batch: Batch) -> float:
    return float(batch.loss_mask.sum())
