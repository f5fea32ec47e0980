"""What a value is beside others: exactly 0 where all are equal. A mean of equal floating-point numbers rounds, and dividing by
their deviation, which is then one rounding error itself, would make that error an advantage."""

from __future__ import annotations

from torch import Tensor


def centred(values: Tensor) -> Tensor:
    """[n] -> [n] float64: the values less their mean."""
    values = values.double()
    if not len(values) or values.min() == values.max():
        return values.new_zeros(len(values))
    return values - values.mean()
