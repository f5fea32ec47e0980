"""Agreement of two ranks: an error of one stops both, and one writes for all."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from rlcore_backends.common import node_address

from rlcore.distributed import world
from rlcore.errors import NonFinite


def main(mine, address):
    """One of two ranks; only the second has an error."""
    world.join(mine, 2, address, "gloo", torch.device("cpu"), replicas=1, sequence=1)
    world.agree(None)
    fault = NonFinite("the loss is not finite", {"what": "loss"}) if mine else None
    said = "the loss is not finite" if mine else "a number of this step is not finite on another rank"
    with pytest.raises(NonFinite, match=said):
        world.agree(fault)
    assert world.first() == (mine == 0)
    assert not world.alone()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_fault_of_one_rank_stops_all_and_one_rank_writes():
    address = node_address.free_endpoint("127.0.0.1")
    command = [sys.executable, __file__, address]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        said = [rank.communicate(timeout=90)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "".join(said)


def test_a_process_alone_writes_and_agrees_with_itself():
    assert world.alone() and world.first()
    world.agree(None)
    with pytest.raises(NonFinite, match="mine"):
        world.agree(NonFinite("mine", {}))


if __name__ == "__main__":
    main(int(sys.argv[2]), sys.argv[1])
