"""The value model of PPO: the policy's architecture with one number a token in place of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlcore.algorithms import aggregation, ppo
from rlcore.config import AlgorithmConfig, OptimizerConfig
from rlcore.learner import Learner, combined, tokens
from rlcore.packing import Packed, microbatches
from rlcore.policy import ForwardSettings, Passes
from rlcore.protocols import Adapter
from rlcore.types import Batch, Metrics, TokenLoss, ValueView


class TorchCritic:
    """Says at each response token, before it is drawn, what the response will earn."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, settings: ForwardSettings, algorithm: AlgorithmConfig,
        optimizer: OptimizerConfig, passes: Passes,
    ) -> None:
        """`model` gives the hidden states; its vocabulary head stays unused. Values start at 0."""
        self.adapter, self.settings, self.passes = adapter, settings, passes
        width = adapter.head(model).shape[1]
        head = nn.Linear(width, 1, device=settings.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.model = nn.ModuleDict({"backbone": model, "head": head})
        self.learner = Learner(self.model, optimizer, passes.total_steps)
        self._loss = partial(ppo.value_loss, clip=algorithm.value_clip)

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        """[N] float32."""
        result = torch.empty(len(batch.loss_mask))
        with self.settings.autocast():
            for packed in microbatches(batch, self.settings.max_tokens):
                result[packed.index] = self._forward(packed).cpu()
        return result

    def update(self, batch: Batch) -> Metrics:
        """One optimizer step on each share of the groups, towards `batch.returns`."""
        shares = self.passes.shares(len(batch.groups), self.learner.steps)
        result = combined([self._step(batch.select(share)) for share in shares])
        return {name if "/" in name else f"critic/{name}": value for name, value in result.items()}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in self.model.named_parameters()}
        save_file(state, folder / "critic.safetensors")
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        saved = load_file(folder / "critic.safetensors")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(saved[name])
        self.learner.load(folder)

    def _step(self, batch: Batch) -> Metrics:
        shares = aggregation.token_mean(batch)
        return self.learner.step(batch, shares, tokens(batch), self._losses(batch))

    def _losses(self, batch: Batch) -> Iterator[tuple[Tensor, TokenLoss]]:
        assert batch.values is not None and batch.returns is not None
        with self.settings.autocast():
            for packed in microbatches(batch, self.settings.max_tokens):
                mask = batch.loss_mask[packed.index]
                index = packed.index[mask]
                if len(index):
                    values = self._forward(packed)[mask.to(self.settings.device)]
                    before, returns = batch.values[index].to(values.device), batch.returns[index].to(values.device)
                    yield index, self._loss(ValueView(values, before, returns))

    def _forward(self, packed: Packed) -> Tensor:
        """[M]: the value at the place from which each target is predicted."""
        hidden = self.adapter.hidden(self.model["backbone"], packed, None)[packed.sources.to(self.settings.device)]
        return self.model["head"](hidden)[:, 0].float()
