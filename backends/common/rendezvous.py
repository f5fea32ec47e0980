"""Where processes meet that have no ranks in common: the trainer's first, and the engines of other pools."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PATIENCE = timedelta(hours=24)  # one side may train for long before the other has something to receive


def store(address: str, rank: int, size: int) -> TCPStore:
    """At `address` (host:port, an IPv6 host in brackets), which rank 0 opens."""
    from torch import distributed

    host, port = address.rsplit(":", 1)
    return distributed.TCPStore(host.strip("[]"), int(port), size, is_master=rank == 0)
