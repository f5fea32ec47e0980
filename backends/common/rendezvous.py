"""Rendezvous of processes in different process groups: the trainer's first rank and the engines of other pools."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import ProcessGroupGloo, TCPStore

PATIENCE = timedelta(hours=24)  # one side may train for long before the other has something to receive


def store(address: str, rank: int, size: int, limit: timedelta = timedelta(seconds=300)) -> TCPStore:
    """TCPStore at `address` (host:port, an IPv6 host in brackets), which rank 0 opens; all must come within `limit`."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - it is documented there

    host, port = address.rsplit(":", 1)
    return TCPStore(host.strip("[]"), int(port), size, is_master=rank == 0, timeout=limit)


def host_group(address: str, host: str, rank: int, size: int, seconds: float) -> ProcessGroupGloo:
    """Gloo group over host memory: rendezvous at `address`, traffic over this node's address `host`. A broadcast fails when it
    stands still for so many seconds."""
    from torch.distributed import ProcessGroupGloo

    options, limit = ProcessGroupGloo._Options(), timedelta(seconds=seconds)  # pyright: ignore[reportAttributeAccessIssue]
    options._devices, options._timeout = [ProcessGroupGloo.create_device(hostname=host)], limit
    return ProcessGroupGloo(store(address, rank, size, limit), rank, size, options)
