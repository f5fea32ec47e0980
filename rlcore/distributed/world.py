"""Ranks: process groups, each rank's part of a tensor, agreement on faults. A lone process holds everything."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from rlcore.errors import NonFinite

_PATIENCE = timedelta(hours=24)  # the watchdog detects hangs; a timeout here would cap every step


@dataclass(frozen=True)
class Ranks:
    """A process's rank and groups in its pool."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None  # [replicate, shard] or [shard]; None for a lone process
    sequence: distributed.ProcessGroup | None = None  # sequence-parallel group: the ranks that share a packed row


ALONE = Ranks()


def join(
    rank: int, size: int, address: str, collectives: str, device: torch.device, replicas: int, sequence: int
) -> Ranks:
    """Rendezvous with the other ranks at `address` (host:port). Adjacent ranks form a sequence-parallel group."""
    where = f"tcp://{address}"
    distributed.init_process_group(collectives, init_method=where, rank=rank, world_size=size, timeout=_PATIENCE)
    if size == 1:
        return Ranks()
    shape, names = ((replicas, size // replicas), ("replicate", "shard")) if replicas > 1 else ((size,), ("shard",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    groups = [distributed.new_group(list(range(first, first + sequence))) for first in range(0, size, sequence)]
    mine = groups[rank // sequence]
    assert isinstance(mine, distributed.ProcessGroup), "every rank is a member of its own group"
    return Ranks(rank, size, mesh, mine if sequence > 1 else None)


def alone() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1


def first() -> bool:
    """Whether this rank is the one that writes shared files."""
    return alone() or distributed.get_rank() == 0


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank; a collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """This rank's part of the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def agree(fault: NonFinite | None) -> None:
    """Raise NonFinite on every rank if any has a fault: none may wait for a rank that has stopped."""
    found = torch.tensor(float(fault is not None))
    if not alone():
        distributed.all_reduce(found)
    if fault is not None:
        raise fault
    if found:
        raise NonFinite("a number of this step is not finite on another rank", {})
