"""Forward pass over a packed row, and its settings, shared by actor, reference and critic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rlcore.distributed.ulysses import Slice
from rlcore.model.logprob import TILE_BYTES, token_logprobs
from rlcore.monitor.heartbeat import no_heartbeat
from rlcore.protocols import ModelFamily
from rlcore.types import Packed


@dataclass(frozen=True)
class ForwardSettings:
    """Forward-pass settings, shared by actor, reference and critic."""

    device: torch.device
    compute_dtype: torch.dtype
    max_tokens: int  # cap of a packed row
    temperature: float  # log-probabilities are those of logits / temperature, the distribution that was sampled
    sequence: ProcessGroup | None = None  # sequence-parallel group, whose ranks share each packed row and all get it whole
    beat: Callable[[], None] = no_heartbeat  # heartbeat, called for every packed row
    tile_bytes: int = TILE_BYTES  # logits computed at a time


class Forward(nn.Module):
    """Forward pass over a packed row. All reads of weights happen inside it, where FSDP has gathered sharded ones."""

    def __init__(self, model: nn.Module, family: ModelFamily, settings: ForwardSettings) -> None:
        super().__init__()
        self.model, self.family, self.settings = model, family, settings

    def forward(self, packed: Packed, entropy: bool = True) -> tuple[Tensor, Tensor]:
        """[M] log-probabilities and [M] entropies of the row's targets, float32; without `entropy`, zeros in their place."""
        self.settings.beat()
        part, predictors = Slice(packed.tokens, self.settings.sequence), packed.predictors
        hidden = part.at(self.family.hidden(self.model, packed, part), predictors)
        targets = packed.targets[part.held(predictors)].to(self.settings.device)
        head, settings = self.family.head(self.model), self.settings
        logprobs, spread = token_logprobs(hidden, head, targets, settings.temperature, settings.tile_bytes, entropy)
        return part.all_of(logprobs, predictors), part.all_of(spread, predictors)
