"""Sums over ranks. Alone, a process is its own sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, distributed


def alone() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1


def total(value: Tensor) -> Tensor:
    """The sum over ranks, on each of them."""
    if alone():
        return value
    result = value.clone()
    distributed.all_reduce(result)
    return result


def total_counts(counts: Mapping[str, float]) -> dict[str, float]:
    """The same by name; a rank that lacks a name has 0."""
    if alone():
        return dict(counts)
    result: Counter[str] = Counter()
    for part in _everyones(counts):
        result.update(part)
    return dict(result)


def maxima(values: Mapping[str, float]) -> dict[str, float]:
    """The largest over ranks, by name."""
    if alone():
        return dict(values)
    result: dict[str, float] = {}
    for part in _everyones(values):
        result |= {name: max(value, result.get(name, value)) for name, value in part.items()}
    return result


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Each parameter's gradient becomes the sum over ranks; a rank that has none counts as zeros."""
    if alone():
        return
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)


def _everyones(values: Mapping[str, float]) -> list[dict[str, float]]:
    parts: list[dict[str, float]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, dict(values))
    return parts
