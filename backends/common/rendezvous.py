"""Rendezvous of processes in different process groups: the trainer's first rank and the engines of other pools."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

PATIENCE = timedelta(hours=24)  # one side may train for long before the other has something to receive


def store(address: str, rank: int, size: int) -> TCPStore:
    """TCPStore at `address` (host:port, an IPv6 host in brackets), which rank 0 opens."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - it is documented there

    host, port = address.rsplit(":", 1)
    return TCPStore(host.strip("[]"), int(port), size, is_master=rank == 0)
