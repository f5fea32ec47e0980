"""A model in memory, what it takes to run it on packed rows, and what it takes to train it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rlcore.algorithms.objective import Objective, Reduction
from rlcore.algorithms.schedule import MinibatchSchedule
from rlcore.config.sections import OptimizerConfig
from rlcore.distributed.fsdp import Sharding, accumulated, at_rest, read
from rlcore.model.forward import ForwardSettings
from rlcore.model.optimizer import ADAMW, Learner, StepStatistics, combined
from rlcore.model.packing import microbatches
from rlcore.model.precision import WorkingCopy, hold_frozen
from rlcore.protocols import ModelFamily
from rlcore.types import Batch, Metrics, Packed, TokenLoss


@dataclass(frozen=True)
class LoadedModel:
    """A model, and how its weights lie on the ranks."""

    module: nn.Module
    family: ModelFamily
    sharding: Sharding | None = None  # None: whole on this device
    weights_from: Path | None = None  # folder that a meta model's weights are still to be read from
    tower: nn.Module | None = None  # vision encoder that stays whole on every rank


class PackedModel:
    """A model that runs on packed rows: sharded, filled, and with the copy of its weights that it computes with."""

    def __init__(self, forward: nn.Module, loaded: LoadedModel, settings: ForwardSettings) -> None:
        """`forward` maps a `Packed` to values of its targets and holds the module. All ranks call everything here together."""
        self.forward, self.loaded, self.settings = forward, loaded, settings
        self.model, self.family = loaded.module, loaded.family
        sharding = loaded.sharding
        hold_frozen(forward, settings.compute_dtype)
        if sharding:
            sharding.apply(forward, self.family.blocks(self.model), loaded.tower)
        if loaded.weights_from:
            home = sharding.home if sharding else settings.device
            read(forward, self.model, self.family.published, loaded.weights_from, home)
        self.working = WorkingCopy(forward, settings.compute_dtype, made_elsewhere=sharding is not None)

    @torch.no_grad()
    def run(self, batch: Batch, values: Callable[[Packed], Tensor]) -> Tensor:
        """[N] float32: `values` of every packed row, in the order of the batch, without gradients."""
        result = torch.empty(len(batch.loss_mask))
        with self.working():
            for packed in microbatches(batch, self.settings.max_tokens):
                result[packed.index] = values(packed).cpu()
        at_rest(self.forward)
        return result


class TrainedModel(PackedModel):
    """A packed model with its optimizer."""

    def __init__(
        self, forward: nn.Module, loaded: LoadedModel, settings: ForwardSettings, trained: nn.Module,
        optimizer: OptimizerConfig, schedule: MinibatchSchedule, adamw: Callable[..., torch.optim.Optimizer] = ADAMW,
    ) -> None:  # fmt: skip
        """`trained`: the module whose parameters learn, under the names that a checkpoint gives their moments."""
        super().__init__(forward, loaded, settings)
        self.schedule = schedule
        self.learner = Learner(trained, optimizer, schedule.total_steps, adamw)
        self.learner.optimizer.register_step_post_hook(self.working.expire)

    def step(self, batch: Batch) -> StepStatistics:
        """Take one optimizer step; `batch` is this rank's part of it. An error leaves the model on its own weights."""
        with closing(self._losses(batch)) as losses:  # which run on the working copy
            return self.learner.step(batch, losses)

    def stepped(self, batch: Batch, objective: Objective | Reduction) -> Metrics:
        """Combined metrics of one optimizer step per minibatch of the schedule."""
        steps = self.schedule.steps(batch, objective, self.learner.steps)
        return combined([(self.step(step), step.denominator) for step in steps])

    def _losses(self, batch: Batch) -> Generator[tuple[Tensor, TokenLoss], None, None]:
        """Yield, per micro-batch, the indices in [N] of the tokens that count, and their loss."""
        raise NotImplementedError

    def rows(self, batch: Batch, whole_groups: bool = False) -> Iterable[Packed]:
        """Packed rows of a part of an optimizer step; gradients are reduced after the last, or after each."""
        rows = microbatches(batch, self.settings.max_tokens, whole_groups)
        return accumulated(self.forward, rows, self.loaded.sharding)
