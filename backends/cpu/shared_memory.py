"""All-gather between processes of one machine through shared memory: one copy in, none out."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

FOLDER = Path("/dev/shm")
_ALIGNED = 64  # bytes


def one_machine(group: dist.ProcessGroup) -> bool:
    """Whether all ranks run on this host and see the same shared memory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    here = (socket.gethostname(), boot.read_text() if boot.exists() else "", os.stat(FOLDER).st_ino if FOLDER.exists() else 0)
    everyones: list[object] = [None] * group.size()
    dist.all_gather_object(everyones, here, group=group)
    return FOLDER.exists() and all(there == here for there in everyones)


class SharedExchange:
    """`rlcore.distributed.fsdp.Exchange` with two alternating regions: a call's result stays valid until the next but one."""

    def __init__(self, group: dist.ProcessGroup, region_bytes: int) -> None:
        self._group, self._bytes = group, region_bytes
        self._regions: list[Tensor] = []
        self._turn = 0

    def __call__(self, parts: Sequence[Tensor], most: Sequence[int]) -> Sequence[Tensor]:
        ranks, rank, kind = self._group.size(), self._group.rank(), parts[0].dtype
        exact = [ranks * elements * kind.itemsize for elements in most]
        sizes = [-(-size // _ALIGNED) * _ALIGNED for size in exact]
        places = self._region(sum(sizes)).split(sizes)
        wholes = [place[:size].view(kind) for place, size in zip(places, exact, strict=True)]
        for whole, part, elements in zip(wholes, parts, most, strict=True):
            whole[rank * elements : rank * elements + part.numel()] = part
        dist.barrier(self._group)
        return wholes

    def _region(self, size: int) -> Tensor:
        """The other region, [size] bytes. No rank still reads it: all have passed the barrier of the call after it."""
        if not self._regions or size > len(self._regions[0]):
            self._bytes = max(self._bytes, size)
            self._regions = [_mapped(self._group, self._bytes) for _ in range(2)]
        self._turn = 1 - self._turn
        return self._regions[self._turn][:size]


def _mapped(group: dist.ProcessGroup, size: int) -> Tensor:
    """[size] bytes shared by all ranks; freed when the last of them ends."""
    name = [f"rlcore-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name, group_src=0, group=group)
    path = FOLDER / name[0]
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=size)
    assert isinstance(storage, torch.UntypedStorage), "torch's annotation says less"
    dist.barrier(group)
    if group.rank() == 0:
        path.unlink()
    return torch.empty(0, dtype=torch.uint8).set_(storage)
