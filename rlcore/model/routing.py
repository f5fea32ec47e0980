"""Routers of mixtures of experts: in float32 whatever the model's dtype, since rounded logits send tokens to other experts;
how evenly they spread the tokens; and routing replay, by which training uses the experts that the engine chose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from rlcore.distributed.ulysses import Slice
from rlcore.errors import RunError
from rlcore.types import Metrics, Packed


class Router(nn.Module):
    """Sends each token to the `top_k` experts of the largest softmax probability (arXiv 2101.03961, 2401.04088)."""

    def __init__(self, weight: nn.Parameter, top_k: int, normalized: bool) -> None:
        """weight [E, D]; `normalized`: the weights of a token's experts sum to 1."""
        super().__init__()
        self.weight, self.top_k, self.normalized = weight, top_k, normalized
        self.counted: Tensor | None = None  # [T] weight of each token in the sums; None: they are not kept
        self.sums: Tensor | None = None  # [2 E + 2]: tokens by expert, probabilities by expert, entropies, rerouted choices
        self.replayed: Tensor | None = None  # [T, k] experts to send the tokens to
        self.record: list[Tensor] | None = None  # where it sent the tokens of each call, [T, k] each; None: it is not kept

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [T, D] -> logits [T, E], weights [T, k] of the chosen experts, and those [T, k]; float32."""
        logits = nn.functional.linear(hidden.float(), self.weight.float())
        odds = logits.softmax(-1)
        own = odds.topk(self.top_k, dim=-1).indices
        experts = own if self.replayed is None else self.replayed
        weights = odds.gather(-1, experts)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.record is not None:
            self.record.append(experts)
        if self.counted is not None:
            self._add(logits.detach(), experts, own, self.counted)
        return logits, weights, experts

    def _add(self, logits: Tensor, experts: Tensor, own: Tensor, counted: Tensor) -> None:
        logprobs = logits.log_softmax(-1)
        odds, chosen = logprobs.exp(), torch.zeros_like(logits).scatter_(1, experts, 1.0)
        rerouted = (experts[:, :, None] != own[:, None, :]).all(-1).sum(-1, keepdim=True)
        found = torch.cat([chosen, odds, -(odds * logprobs).sum(-1, keepdim=True), rerouted.to(odds)], dim=1)
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
        """sums [L, 2 E + 2] as `Router.sums`."""
        self.sums, self.tokens = sums.double(), tokens

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        return RoutingStatistics(self.sums + other.sums, self.tokens + other.tokens)

    def metrics(self) -> Metrics:
        """`moe/*`: the busiest expert's tokens over the mean, in the layer where that is largest; the share of experts without
        a token; the mean entropy of a token's probabilities; the load-balancing loss of arXiv 2101.03961, 1 when even; and the
        share of choices that are the engine's and not the router's own."""
        if not self.tokens:
            return {}
        experts = self.sums.shape[1] // 2 - 1
        loads, odds, entropy, rerouted = self.sums.split([experts, experts, 1, 1], dim=1)
        share = loads / loads.sum(1, keepdim=True)
        return {
            "moe/load_max": float(share.max()) * experts,
            "moe/idle_experts": float((loads == 0).double().mean()),
            "moe/router_entropy": float(entropy.mean()) / self.tokens,
            "moe/balance_loss": float((share * odds).sum(1).mean()) * experts / self.tokens,
            "moe/rerouted": float(rerouted.sum() / loads.sum()),
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
        rows = [torch.zeros(2 * len(one.weight) + 2) if one.sums is None else one.sums.cpu() for one in self._routers]
        sums = torch.stack(rows)
        if self._sequence is not None:
            device = self._routers[0].weight.device
            distributed.all_reduce(sums := sums.to(device), group=self._sequence)
        return RoutingStatistics(sums.cpu(), self._tokens)


class RoutingReplay:
    """Sends the tokens of packed rows to the experts that the engine chose for them (R3, arXiv 2510.11370). Their
    probabilities, and so the gradients of the routers, stay the trainer's own."""

    def __init__(self, model: nn.Module, sequence: ProcessGroup | None = None) -> None:
        """`sequence`: the ranks that share each packed row."""
        self._routers, self._sequence = routers_of(model), sequence

    @contextmanager
    def over(self, packed: Packed) -> Iterator[None]:
        """Replay in passes over `packed`, the backward pass included: layers may run again there. RunError when the engine did
        not give the experts, or those of another model."""
        for router, experts in zip(self._routers, self._shares(packed), strict=True):
            router.replayed = experts
        try:
            yield
        finally:
            for router in self._routers:
                router.replayed = None

    def _shares(self, packed: Packed) -> list[Tensor] | list[None]:
        """[t, k] of this rank's slice, for each router."""
        if not len(packed.targets):
            return [None] * len(self._routers)  # a row that only keeps ranks in step
        router, experts = self._routers[0], packed.experts
        wanted, name = [len(self._routers), router.top_k], packed.names[0]
        if experts is None:
            raise RunError(f"model.routing_replay: {name}: the engine gave no experts for its tokens; set it to false")
        if list(experts.shape[1:]) != wanted or not 0 <= experts.min() <= experts.max() < len(router.weight):
            raise RunError(
                f"model.routing_replay: {name}: the engine gave experts up to {int(experts.max())} of [layers, choices]"
                f" {list(experts.shape[1:])} for each token; the model has {len(router.weight)} experts and {wanted}"
            )
        slices = Slice(packed.tokens, self._sequence).cut(experts.permute(1, 2, 0)).transpose(1, 2)
        return list(slices.to(router.weight.device))


@contextmanager
def recorded(model: nn.Module, wanted: bool = True) -> Iterator[list[NDArray[np.integer]]]:
    """Yield a list that has, after the context, where the routers of `model` sent the tokens of each of its calls therein:
    [T, L, k], in one byte each where that is enough. Stays empty if that is not `wanted`."""
    routers, calls = routers_of(model) if wanted else [], list[NDArray[np.integer]]()
    for router in routers:
        router.record = []
    try:
        yield calls
        kept = np.uint8 if routers and len(routers[0].weight) <= 256 else np.int16
        layers = [router.record or [] for router in routers]
        calls += [torch.stack(call, dim=1).cpu().numpy().astype(kept) for call in zip(*layers, strict=True)]
    finally:
        for router in routers:
            router.record = None


def _wide(layer: Any) -> Router:
    return Router(layer.weight, layer.top_k, layer.norm_topk_prob).train(layer.training)
