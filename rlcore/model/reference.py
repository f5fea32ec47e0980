"""The reference: a frozen model that computes log-probabilities."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from rlcore.distributed.fsdp import Sharding, at_rest, read
from rlcore.model.forward import Forward, ForwardSettings
from rlcore.model.packing import microbatches
from rlcore.model.precision import WorkingCopy, hold_frozen
from rlcore.protocols import ModelFamily
from rlcore.types import Batch


class TorchReference:
    """Computes log-probabilities of a model; the actor derives from it."""

    def __init__(
        self, model: nn.Module, family: ModelFamily, settings: ForwardSettings, sharding: Sharding | None = None,
        source: Path | None = None, tower: nn.Module | None = None,
    ) -> None:
        """`sharding` shards the weights over the ranks, which then call everything here together; those of `tower`, the vision
        encoder's, stay whole on each. Meta tensors are filled from `source`."""
        self.model, self.family, self.settings = model, family, settings
        self.forward = Forward(model, family, settings)
        hold_frozen(model, settings.compute_dtype)
        if sharding:
            sharding.apply(self.forward, family.blocks(model), tower)
        if source:
            read(self.forward, model, family.hf_name, source, sharding.home if sharding else settings.device)
        self.working = WorkingCopy(self.forward, settings.compute_dtype, made_elsewhere=sharding is not None)

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        result = torch.empty(len(batch.loss_mask))
        with self.working():
            for packed in microbatches(batch, self.settings.max_tokens):
                result[packed.index] = self.forward(packed, entropy=False)[0].cpu()
        at_rest(self.forward)
        return result
