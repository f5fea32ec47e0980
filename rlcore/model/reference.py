"""The reference: a frozen model that computes log-probabilities."""

from __future__ import annotations

from torch import Tensor

from rlcore.model.forward import Forward, ForwardSettings
from rlcore.model.loaded import LoadedModel, PackedModel
from rlcore.types import Batch


class TorchReference(PackedModel):
    """Computes log-probabilities of a model."""

    def __init__(self, loaded: LoadedModel, settings: ForwardSettings) -> None:
        super().__init__(Forward(loaded.module, loaded.family, settings), loaded, settings)

    def logprobs(self, batch: Batch) -> Tensor:
        return self.run(batch, lambda packed: self.forward(packed, entropy=False)[0])
