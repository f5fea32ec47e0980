"""The order in which rows are drawn: a function of the seed and the position alone, so that a run resumes by its position."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from functools import lru_cache

_BLOCK = 1000  # places of a mixture, in which each data set has exactly its share


class Order:
    """Data set and row at each place of an endless stream. A data set is shuffled anew each time it has been drawn whole."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        """`sizes`: rows of each data set. `weights`: share of the places each gets; None is all rows alike."""
        self._sizes, self._seed = sizes, seed
        self._shares = None if weights is None else _shares(weights)
        self._shuffled = lru_cache(maxsize=2 * len(sizes))(self._shuffle)
        self._blocks = lru_cache(maxsize=2)(self._block)

    def at(self, place: int) -> tuple[int, int]:
        """Index of the data set, and of the row in it."""
        if self._shares is None:
            epoch, offset = divmod(place, sum(self._sizes))
            return _within(self._sizes, self._shuffled(f"{self._seed}:{epoch}", sum(self._sizes))[offset])
        block, offset = divmod(place, _BLOCK)
        chosen, before = self._blocks(block)
        number = chosen[offset]
        epoch, row = divmod(block * self._shares[number] + before[offset], self._sizes[number])
        return number, self._shuffled(f"{self._seed}:{number}:{epoch}", self._sizes[number])[row]

    def _block(self, block: int) -> tuple[list[int], list[int]]:
        """Data set of each place of a block, and how many of its rows the block has before that place."""
        assert self._shares is not None
        chosen = [number for number, share in enumerate(self._shares) for _ in range(share)]
        random.Random(f"{self._seed}:block:{block}").shuffle(chosen)
        counts, before = [0] * len(self._shares), []
        for number in chosen:
            before.append(counts[number])
            counts[number] += 1
        return chosen, before

    @staticmethod
    def _shuffle(seed: str, size: int) -> Sequence[int]:
        order = array("l", range(size))
        random.Random(seed).shuffle(order)
        return order


def _shares(weights: Sequence[float]) -> list[int]:
    """Places of a block for each data set: at least one, and all together exactly the block (largest remainders)."""
    exact = [max(weight / sum(weights) * _BLOCK, 1.0) for weight in weights]
    exact = [value * _BLOCK / sum(exact) for value in exact]
    shares = [max(int(value), 1) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: shares[number] - exact[number])
    for number in by_remainder[: _BLOCK - sum(shares)]:
        shares[number] += 1
    return shares


def _within(sizes: Sequence[int], row: int) -> tuple[int, int]:
    for number, size in enumerate(sizes):
        if row < size:
            return number, row
        row -= size
    raise IndexError(row)
