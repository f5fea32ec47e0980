"""Load balancing of items of known sizes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def over_ranks(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Assign items to ranks, largest first, each to the rank with the least so far; returns each rank's items, in order.

    No rank gets more than the mean plus one item's size.
    """
    order = sorted(range(len(sizes)), key=lambda item: -sizes[item])
    return [sorted(order[place] for place in share) for share in spread([sizes[item] for item in order], ranks)]


def spread(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Put the items, in order, each into the least loaded of `count` bins."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for item, size in enumerate(sizes):
        held, lightest = heapq.heappop(heap)
        bins[lightest].append(item)
        heapq.heappush(heap, (held + size, lightest))
    return bins
