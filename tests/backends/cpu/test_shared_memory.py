"""Ranks of one machine exchange tensors through shared memory: same result as a collective, no file left behind."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import torch
from rlcore_backends.common import node_address
from rlcore_backends.cpu.shared_memory import SharedExchange, one_machine
from torch import distributed

from rlcore.distributed.fsdp import Collective

RANKS = 2
MOST = [5, 3]  # elements of two tensors on the first rank; the other rank has one fewer of each


def parts(rank, step):
    return [torch.arange(most - rank, dtype=torch.float32) + 100 * rank + 10 * step for most in MOST]


def held(everyones):
    """Each rank's shard of each tensor, without padding."""
    places = [whole.view(RANKS, -1) for whole in everyones]
    return [place[rank, : most - rank].tolist() for most, place in zip(MOST, places, strict=True) for rank in range(RANKS)]


def main(rank, address):
    """One rank; both make the same assertions."""
    distributed.init_process_group("gloo", init_method=f"tcp://{address}", rank=rank, world_size=RANKS)
    group = distributed.group.WORLD
    shared, collective = SharedExchange(group, region_bytes=256), Collective(group)
    before = None
    for step in range(4):
        now, expected = shared(parts(rank, step), MOST), held(collective(parts(rank, step), MOST))
        assert held(now) == expected and expected[:2] == [part.tolist() for part in (parts(0, step)[0], parts(1, step)[0])]
        if before:
            assert held(before[0]) == before[1], "what a call gave outlives the next"
        distributed.barrier()  # no rank writes while another still compares
        before = now, expected
    (large,) = shared([torch.full((1000,), float(rank))], [1000])
    assert large.view(RANKS, -1)[:, 0].tolist() == [0.0, 1.0], "more than the regions had room for"
    mapped = re.findall(r"/dev/shm/rlcore-\S+(.*)", Path("/proc/self/maps").read_text())
    assert mapped and set(mapped) == {" (deleted)"}, mapped
    assert one_machine(group)
    if rank == 1:
        socket.gethostname = lambda: "elsewhere"
    assert not one_machine(group), "of one rank that is elsewhere, all must know"
    distributed.barrier()
    distributed.destroy_process_group()


def test_every_rank_has_what_a_collective_would_give_it():
    address = node_address.free_endpoint("127.0.0.1")
    command = [sys.executable, __file__, address]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(RANKS)]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * RANKS, "".join(said)


if __name__ == "__main__":
    main(int(sys.argv[2]), sys.argv[1])
