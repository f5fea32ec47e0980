"""Sequences whose items are made when they are accessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T", covariant=True)


class LazySequence(Sequence[T]):
    """Makes item i in `at(i)`, at every access."""

    def at(self, index: int) -> T:
        """`index` is from 0 to the length."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.at(place) for place in range(*index.indices(len(self)))]
        return self.at(range(len(self))[index])
