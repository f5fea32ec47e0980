"""Log-probability and entropy of chosen tokens from hidden states, without the [M, V] logits.

The head is tiled over vocabulary and tokens: forward keeps a running log-sum-exp in fp32, backward recomputes each
tile. No more than one tile of logits exists at a time. The online softmax is that of Milakov and Gimelshein
(arXiv 1805.02867); tiling the loss head follows Wijmans et al., Cut Your Losses (arXiv 2411.09009).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOKEN_TILE = 1024
VOCABULARY_TILE = 4096


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
            count = len(targets)
            maximum = scaled.new_full((count,), -torch.inf, dtype=torch.float32)
            total, weighted, chosen = (torch.zeros_like(maximum) for _ in range(3))
            for first in range(0, len(weight), VOCABULARY_TILE):
                columns = weight[first : first + VOCABULARY_TILE].to(compute_dtype)
                for rows in _token_tiles(count):
                    logits = (scaled[rows] @ columns.T).float()
                    before = maximum[rows]
                    highest = torch.maximum(before, logits.amax(1))
                    rescale = (before - highest).exp()
                    maximum[rows] = highest
                    here, place = _inside(targets[rows], first, len(columns))
                    chosen[rows] = torch.where(here, logits.gather(1, place)[:, 0], chosen[rows])
                    odds = (logits - highest[:, None]).exp_()
                    total[rows] = total[rows] * rescale + odds.sum(1)
                    weighted[rows] = weighted[rows] * rescale + logits.mul_(odds).sum(1)
            normalizer = maximum + total.log()
            logprobs, entropy = chosen - normalizer, normalizer - weighted / total
        ctx.save_for_backward(hidden, weight, targets, normalizer, entropy)
        ctx.temperature, ctx.compute_dtype = temperature, compute_dtype
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(normalizer)
        scaled = (hidden / ctx.temperature).to(ctx.compute_dtype)
        grad_hidden = torch.zeros(scaled.shape, dtype=torch.float32, device=scaled.device)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for first in range(0, len(weight), VOCABULARY_TILE):
            columns = weight[first : first + VOCABULARY_TILE].to(ctx.compute_dtype)
            for rows in _token_tiles(len(targets)):
                log_odds = (scaled[rows] @ columns.T).float().sub_(normalizer[rows, None])
                if grad_entropy is None:
                    grad = log_odds.exp_().mul_(-grad_logprobs[rows, None])
                else:
                    slope = (log_odds + entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(grad_logprobs[rows, None])
                    grad = log_odds.exp_().mul_(slope.neg_())
                here, place = _inside(targets[rows], first, len(columns))
                grad.scatter_add_(1, place, torch.where(here, grad_logprobs[rows], 0.0)[:, None])
                grad = grad.to(ctx.compute_dtype)
                grad_hidden[rows] += grad @ columns
                if grad_weight is not None:
                    grad_weight[first : first + len(columns)] += grad.T @ scaled[rows]
        return (grad_hidden / ctx.temperature).to(hidden.dtype), grad_weight, None, None, None


def _token_tiles(count: int) -> list[slice]:
    return [slice(first, first + TOKEN_TILE) for first in range(0, count, TOKEN_TILE)]


def _inside(targets: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """[M] whether the target's column lies in this tile, and [M, 1] where (0 if not)."""
    place = targets - first
    here = (place >= 0) & (place < width)
    return here, torch.where(here, place, 0)[:, None]
