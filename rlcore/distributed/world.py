"""Ranks: what each holds of a tensor, and what they must agree on. Alone, a process holds everything."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from rlcore.errors import NonFinite

_PATIENCE = timedelta(hours=24)  # the watch decides what hangs, not a timeout that no step may exceed


@dataclass(frozen=True)
class Ranks:
    """The processes of a pool, seen from one of them."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None  # [replicate, shard] or [shard]; None is a process alone
    sequence: distributed.ProcessGroup | None = None  # the ones that work on one packed row together


ALONE = Ranks()


def join(
    rank: int, size: int, address: str, collectives: str, device: torch.device, replicas: int, sequence: int
) -> Ranks:
    """Meet the other ranks at `address` (host:port). Neighbours share a sequence."""
    where = f"tcp://{address}"
    distributed.init_process_group(collectives, init_method=where, rank=rank, world_size=size, timeout=_PATIENCE)
    if size == 1:
        return Ranks()
    shape, names = ((replicas, size // replicas), ("replicate", "shard")) if replicas > 1 else ((size,), ("shard",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    groups = [distributed.new_group(list(range(first, first + sequence))) for first in range(0, size, sequence)]
    return Ranks(rank, size, mesh, groups[rank // sequence] if sequence > 1 else None)


def alone() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1


def first() -> bool:
    """Whether this is the rank that writes what all have in common."""
    return alone() or distributed.get_rank() == 0


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank; they call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def agree(fault: NonFinite | None) -> None:
    """Raises it, on every rank if any has one: none may wait for a rank that has given up."""
    found = torch.tensor(float(fault is not None))
    if not alone():
        distributed.all_reduce(found)
    if fault is not None:
        raise fault
    if found:
        raise NonFinite("a number of this step is not finite on another rank", {})
