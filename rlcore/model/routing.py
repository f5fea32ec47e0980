"""Routers of mixtures of experts: in float32 whatever the model's dtype, since rounded logits send tokens to other experts; and
how evenly they spread the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from rlcore.distributed.ulysses import Slice
from rlcore.types import Metrics, Packed


class Router(nn.Module):
    """Sends each token to the `top_k` experts of the largest softmax probability (arXiv 2101.03961, 2401.04088)."""

    def __init__(self, weight: nn.Parameter, top_k: int, normalized: bool) -> None:
        """weight [E, D]; `normalized`: the weights of a token's experts sum to 1."""
        super().__init__()
        self.weight, self.top_k, self.normalized = weight, top_k, normalized
        self.counted: Tensor | None = None  # [T] weight of each token in the sums; None: they are not kept
        self.sums: Tensor | None = None  # [2 E + 1]: tokens by expert, probabilities by expert, entropies

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [T, D] -> logits [T, E], weights [T, k] of the chosen experts, and those [T, k]; float32."""
        logits = nn.functional.linear(hidden.float(), self.weight.float())
        weights, experts = logits.softmax(-1).topk(self.top_k, dim=-1)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.counted is not None:
            self._add(logits.detach(), experts, self.counted)
        return logits, weights, experts

    def _add(self, logits: Tensor, experts: Tensor, counted: Tensor) -> None:
        logprobs = logits.log_softmax(-1)
        odds, chosen = logprobs.exp(), torch.zeros_like(logits).scatter_(1, experts, 1.0)
        found = torch.cat([chosen, odds, -(odds * logprobs).sum(-1, keepdim=True)], dim=1)
        sums = counted.to(found) @ found
        self.sums = sums if self.sums is None else self.sums + sums


def replace_routers(model: nn.Module) -> nn.Module:
    """Put a `Router` in the place of each of transformers' own, with its weight. Those round logits, and the experts' weights,
    to the dtype of the hidden states."""
    for block in list(model.modules()):
        for name, layer in block.named_children():
            if type(layer).__name__.endswith("TopKRouter"):
                setattr(block, name, _wide(layer))
    return model


def routers_of(model: nn.Module) -> list[Router]:
    return [layer for layer in model.modules() if isinstance(layer, Router)]


class RoutingStatistics:
    """What routers did, summed over tokens, micro-batches and ranks."""

    def __init__(self, sums: Tensor, tokens: float) -> None:
        """sums [L, 2 E + 1] as `Router.sums`."""
        self.sums, self.tokens = sums.double(), tokens

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        return RoutingStatistics(self.sums + other.sums, self.tokens + other.tokens)

    def metrics(self) -> Metrics:
        """`moe/*`: the busiest expert's tokens over the mean, in the layer where that is largest; the share of experts without
        a token; the mean entropy of a token's probabilities; and the load-balancing loss of arXiv 2101.03961, 1 when even."""
        if not self.tokens:
            return {}
        experts = self.sums.shape[1] // 2
        loads, odds, entropy = self.sums.split([experts, experts, 1], dim=1)
        share = loads / loads.sum(1, keepdim=True)
        return {
            "moe/load_max": float(share.max()) * experts,
            "moe/idle_experts": float((loads == 0).double().mean()),
            "moe/router_entropy": float(entropy.mean()) / self.tokens,
            "moe/balance_loss": float((share * odds).sum(1).mean()) * experts / self.tokens,
        }


class RoutingWatch:
    """Keeps the statistics of a model's routers over the response tokens that count in the loss, each at the position that
    predicts it: layouts and micro-batches do not change them."""

    def __init__(self, model: nn.Module, sequence: ProcessGroup | None = None) -> None:
        """`sequence`: the ranks that share each packed row."""
        self._routers, self._sequence = routers_of(model), sequence
        self._tokens = 0.0

    def begin(self) -> None:
        self._tokens = 0.0
        for router in self._routers:
            router.sums = None

    @contextmanager
    def over(self, packed: Packed, mask: Tensor) -> Iterator[None]:
        """Watch a forward pass over `packed`; mask [M] bool of its targets. Layers that run again in the backward pass are not
        counted again."""
        counted = torch.zeros(packed.tokens).index_add_(0, packed.predictors, mask.float())
        counted = Slice(packed.tokens, self._sequence).cut(counted)
        self._tokens += float(mask.sum())
        for router in self._routers:
            router.counted = counted
        try:
            yield
        finally:
            for router in self._routers:
                router.counted = None

    def end(self) -> RoutingStatistics | None:
        """The statistics since `begin`, of all ranks that share a row; None of a model without routers."""
        if not self._routers:
            return None
        rows = [torch.zeros(2 * len(one.weight) + 1) if one.sums is None else one.sums.cpu() for one in self._routers]
        sums = torch.stack(rows)
        if self._sequence is not None:
            device = self._routers[0].weight.device
            distributed.all_reduce(sums := sums.to(device), group=self._sequence)
        return RoutingStatistics(sums.cpu(), self._tokens)


def _wide(layer: Any) -> Router:
    return Router(layer.weight, layer.top_k, layer.norm_topk_prob).train(layer.training)
