"""How several of the hub's tensors lie in one of a Megatron-like program, and how tensor parallel ranks share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Layout(Protocol):
    """Both directions; all functions work on meta tensors too."""

    @property
    def dimension(self) -> int | None: ...  # that ranks split

    def join(self, parts: Sequence[Tensor]) -> Tensor: ...  # the hub's tensors -> the other's, whole

    def split(self, whole: Tensor) -> list[Tensor]: ...

    def pieces(self, whole: Tensor, ranks: int) -> list[Tensor]: ...  # runs along `dimension` of which ranks' shares consist

    def shares(self, whole: Tensor, ranks: int) -> list[Tensor]: ...  # of each tensor parallel rank

    def gathered(self, shares: Sequence[Tensor]) -> Tensor: ...  # whole again


@dataclass(frozen=True)
class Same:
    """One tensor, split over ranks along a dimension; None: every rank has all of it."""

    dimension: int | None = None

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        return part

    def split(self, whole: Tensor) -> list[Tensor]:
        return [whole]

    def pieces(self, whole: Tensor, ranks: int) -> list[Tensor]:
        return [whole] if self.dimension is None else _even(whole, ranks, self.dimension)

    def shares(self, whole: Tensor, ranks: int) -> list[Tensor]:
        pieces = self.pieces(whole, ranks)
        return pieces * ranks if self.dimension is None else pieces

    def gathered(self, shares: Sequence[Tensor]) -> Tensor:
        return shares[0] if self.dimension is None else torch.cat(list(shares), self.dimension)


@dataclass(frozen=True)
class GateUp(Same):
    """gate_proj and up_proj in one: [gate; up] whole, [gate_r; up_r] on rank r."""

    dimension: int | None = 0

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def split(self, whole: Tensor) -> list[Tensor]:
        return _even(whole, 2, 0)

    def pieces(self, whole: Tensor, ranks: int) -> list[Tensor]:
        return _even(whole, 2 * ranks, 0)

    def shares(self, whole: Tensor, ranks: int) -> list[Tensor]:
        gate, up = (_even(half, ranks, 0) for half in self.split(whole))
        return [torch.cat(pair) for pair in zip(gate, up, strict=True)]

    def gathered(self, shares: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.cat(halves) for halves in zip(*map(self.split, shares), strict=True)])


@dataclass(frozen=True)
class GroupedQKV(Same):
    """q_proj, k_proj and v_proj by query group: [q .. q k v] of the first, then of the next. Weights and biases."""

    dimension: int | None = 0
    groups: int = 1
    queries: int = 1  # per group

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        rows = parts[0].shape[1:]
        grouped = [part.reshape(self.groups, -1, *rows) for part in parts]
        return torch.cat(grouped, dim=1).reshape(-1, *rows)

    def split(self, whole: Tensor) -> list[Tensor]:
        grouped = whole.reshape(self.groups, -1, *whole.shape[1:])
        head = grouped.shape[1] // (self.queries + 2)
        parts = grouped.split([self.queries * head, head, head], dim=1)
        return [part.reshape(-1, *whole.shape[1:]) for part in parts]

    def pieces(self, whole: Tensor, ranks: int) -> list[Tensor]:
        assert self.groups % ranks == 0, f"{self.groups} query groups on {ranks} ranks"
        return super().pieces(whole, ranks)


@dataclass(frozen=True)
class PerHeadQKV(GroupedQKV):
    """A vision tower's qkv [q of all heads; k; v] by head: [q k v] of the first, then of the next."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        (fused,) = parts
        return super().join(fused.chunk(3))

    def split(self, whole: Tensor) -> list[Tensor]:
        return [torch.cat(super().split(whole))]


def _even(whole: Tensor, parts: int, dimension: int) -> list[Tensor]:
    size = whole.shape[dimension]
    assert size % parts == 0, f"{size} in {parts} parts"
    return list(whole.split(size // parts, dimension)) if size else [whole] * parts
