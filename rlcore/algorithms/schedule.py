"""How a batch becomes optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from rlcore.algorithms.objective import Objective
from rlcore.types import Batch


@dataclass(frozen=True)
class MinibatchSchedule:
    """How a batch becomes optimizer steps."""

    total_steps: int  # optimizer steps of the whole run, for the learning rate
    minibatches: int = 1
    epochs: int = 1
    seed: int = 0

    def steps(self, batch: Batch, objective: Objective, done: int) -> list[Batch]:
        """Each optimizer step's groups, with each token's share of that step's loss."""
        chosen = [batch.select(share) for share in self.minibatches_of(len(batch.groups), done)]
        return [
            replace(step, loss_weights=objective.loss_weights(step), denominator=objective.denominator(step)) for step in chosen
        ]

    def minibatches_of(self, groups: int, done: int) -> Iterator[Sequence[int]]:
        """The groups of each optimizer step, shuffled anew each epoch; `done` steps came before.

        Shares differ by one group at most, and there are always as many as the learning rate's schedule counts on: where there
        are fewer groups than shares some are empty, and an empty one leaves weights and moments as they are.
        """
        for epoch in range(self.epochs):
            order = list(range(groups))
            if self.minibatches > 1:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + done + epoch * self.minibatches)
                order = torch.randperm(groups, generator=generator).tolist()
            bounds = [groups * number // self.minibatches for number in range(self.minibatches + 1)]
            yield from (order[first:end] for first, end in pairwise(bounds))
