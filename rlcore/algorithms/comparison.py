"""Centering that gives exactly 0 for equal values. A mean of equal floating-point numbers rounds, and dividing by their
standard deviation, which is then a rounding error itself, would make that error an advantage."""

from __future__ import annotations

from torch import Tensor


def centred(values: Tensor) -> Tensor:
    """[n] -> [n] float64: the values minus their mean."""
    values = values.double()
    if not len(values) or values.min() == values.max():
        return values.new_zeros(len(values))
    return values - values.mean()
