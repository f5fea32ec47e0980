"""The actor and the reference: one torch model, packed rows in, log-probabilities or optimizer steps out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rlcore import lora
from rlcore.config import OptimizerConfig
from rlcore.learner import Learner, Objective, combined
from rlcore.logprob import token_logprobs
from rlcore.packing import Packed, microbatches
from rlcore.protocols import Adapter, NamedTensors
from rlcore.types import Batch, Metrics, TokenLoss, TokenView
from rlcore.vision import ImageCache


@dataclass(frozen=True)
class ForwardSettings:
    """How a model is run, the same for actor, reference and critic."""

    device: torch.device
    compute_dtype: torch.dtype
    max_tokens: int  # a packed row never holds more
    temperature: float  # log-probabilities are those of logits / temperature, the distribution that was sampled

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        dtype = self.compute_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)


class TorchReference:
    """A model that gives log-probabilities."""

    def __init__(self, model: nn.Module, adapter: Adapter, settings: ForwardSettings, images: ImageCache | None = None) -> None:
        """`images` keeps the embeddings of a frozen vision tower, shared by the models that have the same."""
        self.model, self.adapter, self.settings, self.images = model, adapter, settings, images

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        result = torch.empty(len(batch.loss_mask))
        with self.settings.autocast():
            for packed in microbatches(batch, self.settings.max_tokens):
                result[packed.index] = self._forward(packed)[0].cpu()
        return result

    def _forward(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """[M] log-probabilities and [M] entropies of the row's targets."""
        device = self.settings.device
        hidden = self.adapter.hidden(self.model, packed, self.images)
        return token_logprobs(
            hidden[packed.sources.to(device)], self.adapter.head(self.model), packed.targets.to(device),
            self.settings.temperature, self.settings.compute_dtype,
        )


class AdapterOffReference(TorchReference):
    """The actor's own model without its low-rank additions."""

    def logprobs(self, batch: Batch) -> Tensor:
        with lora.switched_off(self.model):
            return super().logprobs(batch)


@dataclass(frozen=True)
class Passes:
    """How a batch becomes optimizer steps."""

    total_steps: int  # optimizer steps of the whole run, for the learning rate
    minibatches: int = 1
    epochs: int = 1
    seed: int = 0

    def shares(self, groups: int, done: int) -> Iterator[Sequence[int]]:
        """The groups of each optimizer step: equal shares of them, shuffled anew each epoch; `done` steps came before."""
        size = math.ceil(groups / self.minibatches)
        for epoch in range(self.epochs):
            order = list(range(groups))
            if self.minibatches > 1:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + done + epoch * self.minibatches)
                order = torch.randperm(groups, generator=generator).tolist()
            yield from (order[first : first + size] for first in range(0, groups, size))


class TorchActor(TorchReference):
    """The model that learns."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, settings: ForwardSettings, objective: Objective, optimizer: OptimizerConfig,
        passes: Passes, images: ImageCache | None = None, publish_additions: bool = False,
    ) -> None:
        """`publish_additions`: `weights` gives the low-rank additions alone."""
        super().__init__(model, adapter, settings, images)
        self.objective, self.passes, self._publish_additions = objective, passes, publish_additions
        self.learner = Learner(model, optimizer, passes.total_steps)

    def update(self, batch: Batch) -> Metrics:
        """One optimizer step on each share of the groups."""
        shares = self.passes.shares(len(batch.groups), self.learner.steps)
        return combined([self._step(batch.select(share)) for share in shares])

    def weights(self) -> NamedTensors:
        """Every parameter once, under its published name, low-rank additions added: a tied head is its embedding."""
        for name, tensor in lora.additions(self.model) if self._publish_additions else lora.merged(self.model):
            yield self.adapter.published_name(name), tensor.detach()

    def save(self, folder: Path) -> None:
        lora.save_merged(self.model, folder / "model")
        lora.save_additions(self.model, folder)
        self.adapter.save_processor(folder / "model")
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        if lora.has_additions(self.model):
            lora.load_additions(self.model, folder)
        else:
            fresh = self.adapter.load(folder / "model", torch.float32).to(self.settings.device)
            self.model.load_state_dict(fresh.state_dict())
        self.learner.load(folder)

    def _step(self, batch: Batch) -> Metrics:
        objective = self.objective
        return self.learner.step(batch, objective.shares(batch), objective.unit(batch), self._losses(batch))

    def _losses(self, batch: Batch) -> Iterator[tuple[Tensor, TokenLoss]]:
        """Micro-batch by micro-batch: the places in [N] of the tokens that count, and their loss."""
        if not batch.loss_mask.any():
            return
        with self.settings.autocast():
            for packed in microbatches(batch, self.settings.max_tokens, self.objective.whole_groups):
                mask = batch.loss_mask[packed.index]
                if mask.any():
                    logprobs, entropy = self._forward(packed)
                    index, mask = packed.index[mask], mask.to(logprobs.device)
                    yield index, self.objective.loss(_view(batch, index, logprobs[mask], entropy[mask]))


def _view(batch: Batch, index: Tensor, logprobs: Tensor, entropy: Tensor) -> TokenView:
    """The tokens at `index` of the batch."""

    def here(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[index].to(logprobs.device)

    _, sequence = batch.sequence[index].unique_consecutive(return_inverse=True)
    return TokenView(
        logprobs=logprobs, entropy=entropy, sequence=sequence.to(logprobs.device),
        rollout_logprobs=batch.rollout_logprobs[index].to(logprobs.device), advantages=here(batch.advantages),
        ref_logprobs=here(batch.ref_logprobs), old_logprobs=here(batch.old_logprobs), kl_coef=batch.kl_coef,
    )  # fmt: skip
