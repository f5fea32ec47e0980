"""The value model of PPO: the policy's architecture with a scalar head in place of the vocabulary head."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlcore.algorithms import aggregation, ppo
from rlcore.algorithms.objective import Reduction, tokens
from rlcore.algorithms.schedule import MinibatchSchedule
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.config.sections import OptimizerConfig
from rlcore.distributed.parts import Stored, fill
from rlcore.distributed.snapshot import Snapshot
from rlcore.distributed.ulysses import Slice
from rlcore.model.forward import ForwardSettings
from rlcore.model.loaded import LoadedModel, TrainedModel
from rlcore.model.optimizer import ADAMW
from rlcore.protocols import ModelFamily
from rlcore.types import Batch, Metrics, Packed, TokenLoss, ValueView

_FOLDER = "critic/"  # in a checkpoint
OBJECTIVE = Reduction(aggregation.token_mean, tokens)


class ValueForward(nn.Module):
    """Forward pass of the value model over a packed row."""

    def __init__(self, backbone: nn.Module, family: ModelFamily, settings: ForwardSettings) -> None:
        """`backbone` gives the hidden states; its vocabulary head stays unused. Values start at 0."""
        super().__init__()
        self.backbone, self.family, self.settings = backbone, family, settings
        self.head = nn.Linear(family.head(backbone).shape[1], 1, device=settings.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, packed: Packed) -> Tensor:
        """[M] values, each at the token that predicts the target."""
        part = Slice(packed.tokens, self.settings.sequence)
        hidden = part.at(self.family.hidden(self.backbone, packed, part), packed.predictors)
        values = functional.linear(hidden.float(), self.head.weight.float(), self.head.bias.float()).flatten().clone()
        return part.all_of(values, packed.predictors)  # cloned above: an FSDP module must not return a view


class TorchCritic(TrainedModel):
    """Estimates the expected return before each response token."""

    def __init__(
        self, loaded: LoadedModel, settings: ForwardSettings, algorithm: AlgorithmConfig, optimizer: OptimizerConfig,
        schedule: MinibatchSchedule, adamw: Callable[..., torch.optim.Optimizer] = ADAMW,
    ) -> None:  # fmt: skip
        forward = ValueForward(loaded.module, loaded.family, settings)
        super().__init__(forward, loaded, settings, forward, optimizer, schedule, adamw)
        self._loss = partial(ppo.value_loss, clip=algorithm.value_clip)

    def values(self, batch: Batch) -> Tensor:
        """[N] float32."""
        return self.run(batch, self.forward)

    def update(self, batch: Batch) -> Metrics:
        """Take one optimizer step per minibatch of the schedule, towards `batch.returns`; returns their combined metrics."""
        return named(self.stepped(batch, OBJECTIVE))

    def save(self, snapshot: Snapshot) -> None:
        snapshot.tensors(f"{_FOLDER}critic", self.forward.named_parameters())
        self.learner.save(snapshot, _FOLDER)

    def load(self, folder: Path) -> None:
        fill(self.forward.named_parameters(), Stored(folder / _FOLDER))
        self.learner.load(folder / _FOLDER)

    def _losses(self, batch: Batch) -> Generator[tuple[Tensor, TokenLoss], None, None]:
        assert batch.values is not None and batch.returns is not None
        if not batch.denominator:
            return
        with self.working():
            for packed in self.rows(batch):
                mask = batch.loss_mask[packed.index]
                index = packed.index[mask]
                values = self.forward(packed)[mask.to(self.settings.device)]
                before, returns = batch.values[index].to(values.device), batch.returns[index].to(values.device)
                yield index, self._loss(ValueView(values, before, returns)) if len(index) else TokenLoss(values)


def named(metrics: Metrics) -> Metrics:
    """Prefix metric names with `critic/` unless they have a prefix."""
    return {name if "/" in name else f"critic/{name}": value for name, value in metrics.items()}
