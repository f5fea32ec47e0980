"""Minibatch schedule: a batch split into optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from rlcore.algorithms.objective import Objective, Reduction
from rlcore.types import Batch


@dataclass(frozen=True)
class MinibatchSchedule:
    """Splits each batch into minibatches, one optimizer step each, over several epochs."""

    total_steps: int  # optimizer steps of the whole run, for the learning rate
    minibatches: int = 1
    epochs: int = 1
    seed: int = 0

    def steps(self, batch: Batch, objective: Objective | Reduction, done: int) -> list[Batch]:
        """Split a batch into optimizer steps, each with its loss weights and denominator."""
        chosen = [batch.select(share) for share in self.minibatches_of(len(batch.groups), done)]
        return [
            replace(step, loss_weights=objective.loss_weights(step), denominator=objective.denominator(step)) for step in chosen
        ]

    def minibatches_of(self, groups: int, done: int) -> Iterator[Sequence[int]]:
        """Yield the group indices of each optimizer step, reshuffled each epoch; `done` steps came before.

        Minibatches differ by one group at most. Their number is fixed, as the learning-rate schedule counts on it: with fewer
        groups than minibatches some are empty, and an empty one leaves weights and moments unchanged.
        """
        for epoch in range(self.epochs):
            order = list(range(groups))
            if self.minibatches > 1:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + done + epoch * self.minibatches)
                order = torch.randperm(groups, generator=generator).tolist()
            bounds = [groups * number // self.minibatches for number in range(self.minibatches + 1)]
            yield from (order[first:end] for first, end in pairwise(bounds))
