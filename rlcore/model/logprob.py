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

TILE_BYTES = 4 * 2**20  # float32 logits computed at a time; a backend may give another size
_NOTHING = -1e30  # initial running maximum, finite so that 0 times it is 0


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, tile_bytes: int = TILE_BYTES,
    entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """hidden [M, D], weight [V, D], targets [M] -> log p(target) [M] and entropy [M] in nats, both float32, of
    softmax(hidden @ weight.T / temperature). Products are in the dtype of `hidden`, all else in float32. Differentiable in both
    outputs with respect to hidden and weight. Without `entropy`, zeros take its place."""
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, tile_bytes, entropy)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, tile_bytes: int, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Running over the vocabulary: `highest`, the largest logit; `total`, the sum of exp(logit - highest); `moment`, the
        sum of exp(logit - highest) * (logit - highest)."""
        highest = hidden.new_full((len(targets),), _NOTHING, dtype=torch.float32)
        chosen, total, moment = (torch.zeros_like(highest) for _ in range(3))
        for rows, words, logits in _tiles(hidden, weight, temperature, tile_bytes):
            place = targets[rows] - words.start
            here = (place >= 0) & (place < logits.shape[1])
            chosen[rows] += logits.gather(1, place.where(here, 0)[:, None])[:, 0].where(here, 0)
            higher = torch.maximum(highest[rows], logits.amax(1))
            shift, highest[rows] = highest[rows] - higher, higher
            below = logits.sub_(highest[rows, None])
            odds = below.exp() if entropy else below.exp_()
            moment[rows] = shift.exp() * (moment[rows] + shift * total[rows])
            total[rows] = shift.exp() * total[rows] + odds.sum(1)
            if entropy:
                moment[rows] += odds.mul_(below).sum(1)
        spread = total.log() - moment / total if entropy else moment
        ctx.save_for_backward(hidden, weight, targets, highest, total, spread)
        ctx.temperature, ctx.tile_bytes = temperature, tile_bytes
        ctx.set_materialize_grads(False)
        return (chosen - highest) - total.log(), spread

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grad_outputs
        hidden, weight, targets, highest, total, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(total)
        upstream = (grad_logprobs / ctx.temperature)[:, None]
        grad_hidden = upstream * weight[targets]
        grad_weight = None
        if ctx.needs_input_grad[1]:
            sums = torch.promote_types(weight.dtype, torch.float32)  # a weight may come in the compute dtype
            grad_weight = torch.zeros_like(weight, dtype=sums).index_add_(0, targets, (upstream * hidden).to(sums))
        factor = upstream / total[:, None] if grad_entropy is None else total[:, None].reciprocal()
        pulled = (factor * hidden).to(hidden.dtype)  # a token's gradient on a word, up to the factor exp(logit - highest)
        for rows, words, logits in _tiles(hidden, weight, ctx.temperature, ctx.tile_bytes):
            odds = logits.sub_(highest[rows, None])
            if grad_entropy is None:
                odds = odds.exp_()
            else:
                slope = (odds + (entropy - total.log())[rows, None]).mul_(grad_entropy[rows, None] / ctx.temperature)
                odds = odds.exp_().mul_(slope.add_(upstream[rows]))
            odds = odds.to(hidden.dtype)
            grad_hidden[rows] -= factor[rows] * (odds @ weight[words].to(hidden.dtype))
            if grad_weight is not None:
                grad_weight[words] -= odds.T @ pulled[rows]
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


def _tiles(hidden: Tensor, weight: Tensor, temperature: float, tile_bytes: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield each tile's token and vocabulary slices and its float32 logits, which the caller may overwrite."""
    side = max(1, int((tile_bytes / 4) ** 0.5))
    tokens = min(len(hidden), side)
    words = max(1, tile_bytes // 4 // max(tokens, 1))
    for first in range(0, len(weight), words):
        columns = weight[first : first + words].to(hidden.dtype)
        for start in range(0, len(hidden), side):
            rows = slice(start, start + side)
            logits = (hidden[rows] @ columns.T).float()
            yield rows, slice(first, first + words), logits if temperature == 1 else logits.div_(temperature)
