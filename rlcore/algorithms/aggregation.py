"""Loss aggregation: each token's loss weight, over the whole optimizer batch.

Weights are computed once for the batch and then split with it, so that no packing, micro-batch or rank can change a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.config.algorithm import AlgorithmConfig
from rlcore.types import Batch


def loss_weights(batch: Batch, config: AlgorithmConfig, longest: int) -> Tensor:
    """[N] float32, 0 where the loss does not count.

    token_mean: 1 / all tokens (DAPO, arXiv 2503.14476). sequence_mean: 1 / (tokens of the response x responses) (GRPO, arXiv
    2402.03300). sequence_sum: 1 / responses (RLOO, arXiv 2402.14740). constant: 1 / (`longest` x responses), whatever the
    lengths (Dr. GRPO, arXiv 2503.20783). Only responses with a token that counts are counted.
    """
    if config.aggregation == "token_mean":
        return token_mean(batch)
    mask = batch.loss_mask.float()
    counts = sums(mask, batch.sequence)
    responses = counts.count_nonzero().clamp(min=1)
    if config.aggregation == "sequence_mean":
        return mask / (counts.clamp(min=1) * responses)[batch.sequence]
    return mask / (responses * (1 if config.aggregation == "sequence_sum" else config.aggregation_length or longest))


def token_mean(batch: Batch) -> Tensor:
    mask = batch.loss_mask.float()
    return mask / mask.sum().clamp(min=1)


def pair_mean(batch: Batch) -> Tensor:
    """1 / pairs: each group is one pair, whose loss is on one token."""
    return batch.loss_mask / max(len(batch.groups), 1)


def sums(values: Tensor, sequence: Tensor) -> Tensor:
    """Per-response sums: [M] values and the response index of each -> [responses]."""
    return values.new_zeros(int(sequence.max()) + 1 if len(sequence) else 0).index_add(0, sequence, values)


def means(values: Tensor, sequence: Tensor) -> Tensor:
    """Per-response means: [M] values and the response index of each -> [responses]."""
    return sums(values, sequence) / sums(torch.ones_like(values), sequence).clamp(min=1)
