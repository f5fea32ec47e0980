"""Log-probability and entropy of chosen tokens from hidden states, without the [M, V] logits.

The head is tiled over vocabulary and tokens: forward keeps a running log-sum-exp in fp32, backward recomputes each
tile. No more than one tile of logits exists at a time. The online softmax is that of Milakov and Gimelshein
(arXiv 1805.02867); tiling the loss head follows Wijmans et al., Cut Your Losses (arXiv 2411.09009).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TOKEN_TILE = 1024  # of these sizes a tile stays in a processor's cache between the passes over it
VOCABULARY_TILE = 1024
_NOTHING = -1e30  # the log-sum-exp of no logits, finite so that 0 times it is 0


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, compute_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """hidden [M, D], weight [V, D], targets [M] -> log p(target) [M] and entropy [M] in nats, both float32, of
    softmax(hidden @ weight.T / temperature). Products are in `compute_dtype`, sums in float32. Differentiable in both
    outputs with respect to hidden and weight."""
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, compute_dtype)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, compute_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            scaled = (hidden / temperature).to(compute_dtype)
            normalizer = scaled.new_full((len(targets),), _NOTHING, dtype=torch.float32)
            entropy, chosen = torch.zeros_like(normalizer), torch.zeros_like(normalizer)
            for words, columns, rows in _tiles(weight, targets, compute_dtype):
                logits = (scaled[rows] @ columns.T).float()
                place = targets[rows] - words.start
                here = (place >= 0) & (place < len(columns))
                chosen[rows] += logits.gather(1, place.where(here, 0)[:, None])[:, 0].where(here, 0)
                highest, odds, spread = _softmax(logits)
                before, tile = normalizer[rows], highest + spread
                total = torch.logaddexp(before, tile)
                tile_entropy = spread - torch.linalg.vecdot(odds, logits.sub_(highest[:, None]))
                entropy[rows] = (before - total).exp() * (entropy[rows] + total - before)
                entropy[rows] += (tile - total).exp() * (tile_entropy + total - tile)
                normalizer[rows] = total
            logprobs = chosen - normalizer
        ctx.save_for_backward(hidden, weight, targets, normalizer, entropy)
        ctx.temperature, ctx.compute_dtype = temperature, compute_dtype
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(normalizer)
        upstream = grad_logprobs[:, None]
        scaled = (hidden / ctx.temperature).to(ctx.compute_dtype)
        grad_hidden = upstream * weight[targets]
        grad_weight = None
        if ctx.needs_input_grad[1]:
            sums = torch.promote_types(weight.dtype, torch.float32)  # a sharded weight comes in the compute dtype
            grad_weight = torch.zeros_like(weight, dtype=sums).index_add_(0, targets, (upstream * scaled).to(sums))
        for words, columns, rows in _tiles(weight, targets, ctx.compute_dtype):
            logits = (scaled[rows] @ columns.T).float()
            highest, grad, spread = _softmax(logits)
            scale = (highest + spread - normalizer[rows]).exp().neg_()[:, None]
            if grad_entropy is None:
                grad *= scale * upstream[rows]
            else:
                slope = logits.add_((entropy - normalizer)[rows, None]).mul_(grad_entropy[rows, None]).add_(upstream[rows])
                grad *= slope.mul_(scale)
            grad = grad.to(ctx.compute_dtype)
            _add_product(grad_hidden[rows], grad, columns)
            if grad_weight is not None:
                _add_product(grad_weight[words], grad.T, scaled[rows])
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return (grad_hidden / ctx.temperature).to(hidden.dtype), grad_weight, None, None, None


def _tiles(weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, slice]]:
    """The words of each tile, their rows of the weight in `dtype`, and its tokens."""
    for first in range(0, len(weight), VOCABULARY_TILE):
        words = slice(first, first + VOCABULARY_TILE)
        columns = weight[words].to(dtype)
        for start in range(0, len(targets), TOKEN_TILE):
            yield words, columns, slice(start, start + TOKEN_TILE)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a tile: its highest logits, its softmax, and its log-sum-exp less the highest. torch's softmax is one pass; maximum,
    difference, exponential and sum are four."""
    odds = logits.softmax(1)
    return logits.amax(1), odds, odds.amax(1).log().neg_()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in the dtype of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
