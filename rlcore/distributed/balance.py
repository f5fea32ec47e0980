"""Work of known sizes, dealt so that no one has much more of it than another."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def over_ranks(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which items each rank takes, in order: the largest first, each to the rank with the least so far.

    No rank has more than the mean and one item's size.
    """
    order = sorted(range(len(sizes)), key=lambda item: -sizes[item])
    return [sorted(order[place] for place in share) for share in spread([sizes[item] for item in order], ranks)]


def spread(sizes: Sequence[int], count: int) -> list[list[int]]:
    """The items in `count` bins, each in its turn into the one that holds least."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for item, size in enumerate(sizes):
        held, lightest = heapq.heappop(heap)
        bins[lightest].append(item)
        heapq.heappush(heap, (held + size, lightest))
    return bins
