"""Ulysses sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): one packed row over a group of ranks.

Every rank of the group gets the same row and runs the layers on its slice of the tokens. Attention sees the whole row: one
all-to-all trades a slice of all heads for all tokens of some heads, another trades the result back. Every rank ends up with
all log-probabilities and the same loss; its gradients are its own slice's, and their sum over the group is the row's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from math import gcd
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from rlcore.distributed.balance import over_ranks
from rlcore.errors import ConfigError

Attention = Callable[..., tuple[Tensor, Tensor | None]]  # as transformers calls it


@dataclass(frozen=True)
class Slice:
    """This rank's t of a packed row's T tokens. Slices have equal length: the last are padded with tokens that are neither
    attended to nor targets, so that every rank has some and calls every layer."""

    row: int  # T
    group: ProcessGroup | None = None  # None: the row is not shared, and t is T

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def tokens(self) -> int:
        """t."""
        return -(-self.row // self.ranks)

    @property
    def start(self) -> int:
        return self.rank * self.tokens

    def cut(self, row: Tensor) -> Tensor:
        """[..., T] -> [..., t]."""
        return functional.pad(row, (0, self._fill)).narrow(-1, self.start, self.tokens)

    def held(self, places: Tensor) -> Tensor:
        """[M] places in T -> [m] indices of those that lie in this slice."""
        return ((places >= self.start) & (places < self.start + self.tokens)).nonzero()[:, 0]

    def at(self, states: Tensor, places: Tensor) -> Tensor:
        """[t, D] of this slice -> [m, D], the states at the places that lie in it."""
        return states[(places[self.held(places)] - self.start).to(states.device)]

    def all_of(self, values: Tensor, places: Tensor) -> Tensor:
        """[m] values of each rank's slice -> [M], on every rank. All ranks compute the same loss, so a value's gradient is
        taken from one of them: its own rank."""
        if self.group is None:
            return values
        held = self.held(places).to(values.device)
        return _Sum.apply(values.new_zeros(len(places)).index_copy(0, held, values), self.group)

    def dealt(self, sizes: Sequence[int], work: Callable[[Sequence[int]], Sequence[Tensor]]) -> list[Tensor]:
        """Split the items over the ranks, run `work` on each rank's items -> all items' [size, D], on every rank. A rank
        without items repeats the smallest: every rank calls every layer."""
        shares = over_ranks(sizes, self.ranks)
        counts = [sum(sizes[item] for item in share) for share in shares]
        results = work(shares[self.rank] or [sizes.index(min(sizes))])
        rows = self._joined(torch.cat(list(results))[: counts[self.rank]], counts)
        order = [item for share in shares for item in share]
        by_item = dict(zip(order, rows.split([sizes[item] for item in order]), strict=True))
        return [by_item[item] for item in range(len(sizes))]

    def by_heads(self, states: Tensor) -> Tensor:
        """[1, H, t, D], all heads of this slice -> [1, H / ranks, T, D], this rank's heads of the whole row. Heads that the
        ranks do not divide are first repeated until they do."""
        repeats = self.ranks // gcd(self.ranks, states.shape[1])
        heads = states[0].repeat_interleave(repeats, dim=0) if repeats > 1 else states[0]
        shares = heads.unflatten(0, (self.ranks, -1)).transpose(1, 2)  # [ranks, t, H / ranks, D]
        return self._trade(shares).flatten(0, 1)[: self.row].transpose(0, 1)[None]

    def by_tokens(self, states: Tensor) -> Tensor:
        """[1, T, H / ranks, D] -> [1, t, H, D]."""
        slices = functional.pad(states[0], (0, 0, 0, 0, 0, self._fill)).unflatten(0, (self.ranks, -1))
        return self._trade(slices).transpose(0, 1).flatten(1, 2)[None]

    def _joined(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """All-gather [counts[rank], D] -> [sum of counts, D]. Each rank uses the rows that its slice needs, so a row's gradient
        is the sum over all ranks."""
        if self.group is None:
            return rows
        return _AllToAll.apply(rows.repeat(self.ranks, 1), [counts[self.rank]] * self.ranks, counts, self.group)

    @property
    def _fill(self) -> int:
        return self.ranks * self.tokens - self.row

    def _trade(self, parts: Tensor) -> Tensor:
        """All-to-all [ranks, ...]: one part for each rank -> one part from each."""
        each = [1] * self.ranks
        return _AllToAll.apply(parts, each, each, self.group)


def over_slices(attention: Attention) -> Attention:
    """Wrap `attention` to take queries, keys and values of one slice, [1, heads, t, D]. `attention` itself gets whole rows of
    some heads and returns [1, T, heads, D]."""

    @wraps(attention)
    def sliced(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, part: Slice | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if part is None or part.group is None:
            return attention(module, query, key, value, attention_mask, **options)
        check_heads(query.shape[1], part.ranks)
        query, key, value = (part.by_heads(states) for states in (query, key, value))
        attended, _ = attention(module, query, key, value, attention_mask, **options)
        return part.by_tokens(attended), None

    return sliced


def check_heads(heads: int, ranks: int) -> None:
    """ConfigError when the ranks do not divide a model's query heads. Key and value heads can be repeated, so always fit."""
    if heads % ranks:
        divisors = [str(number) for number in range(1, heads + 1) if heads % number == 0]
        raise ConfigError(
            f"sharding.sequence_parallel: {ranks} devices do not divide the model's {heads} query heads; use one of"
            f" {', '.join(divisors)}"
        )


class _AllToAll(torch.autograd.Function):
    """All-to-all of rows; the backward pass is the reverse all-to-all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, given: list[int], taken: list[int], group: ProcessGroup) -> Tensor:
        ctx.back = (taken, given, group)
        result = rows.new_empty(sum(taken), *rows.shape[1:])
        distributed.all_to_all_single(result, rows.contiguous(), taken, given, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grad_outputs
        return _AllToAll.apply(gradient, *ctx.back), None, None, None


class _Sum(torch.autograd.Function):
    """All-reduce over the group. All ranks have the same gradient of the same loss: each keeps its own, none counts twice."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        result = values.clone()
        distributed.all_reduce(result, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grad_outputs
        return gradient, None
