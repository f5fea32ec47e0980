"""Weights between pools: complete, in order, bucket by bucket; a changed bit is reported by name."""

from __future__ import annotations

import threading

import pytest
import torch
from rlcore_backends.common import node_address

from rlcore.distributed.broadcast import WeightBroadcast
from rlcore.errors import RunError

WEIGHTS = {
    "a": torch.arange(12.0).view(3, 4), "half": torch.arange(5, dtype=torch.bfloat16), "none": torch.empty(0, 3),
    "large": torch.randn(100, 10), "view": torch.arange(20.0).view(4, 5).T, "last": torch.ones(1, dtype=torch.int64),
}  # fmt: skip


@pytest.fixture
def ends(backend):
    """One sender and two receivers, one thread each."""
    address = node_address.free_endpoint("127.0.0.1")
    groups = [None] * 3
    threads = [threading.Thread(target=lambda i=i: groups.__setitem__(i, backend.group(address, i, 3))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return groups


def sent(ends, bucket, spoil=None):
    """Weights of each receiver, or the error it raised."""
    received = [None, None]

    def receive(number):
        group = Spoiling(ends[number + 1], spoil) if spoil is not None and number == 1 else ends[number + 1]
        try:
            received[number] = {
                name: tensor.clone() for name, tensor in WeightBroadcast(group, torch.device("cpu"), bucket).receive()
            }
        except RunError as error:
            received[number] = error

    threads = [threading.Thread(target=receive, args=(number,), daemon=True) for number in range(2)]
    sender = WeightBroadcast(ends[0], torch.device("cpu"), bucket)
    threads.append(threading.Thread(target=sender.send, args=(iter(WEIGHTS.items()),), daemon=True))
    for thread in threads:
        thread.start()
    threads[1].join(timeout=60)
    if spoil is None:  # otherwise the others wait for a failed rank
        threads[0].join(timeout=60)
    return received


class Spoiling:
    """A group that changes one byte in each message of a given length."""

    def __init__(self, group, size):
        self.group, self.size = group, size

    def broadcast(self, message, root):
        work = self.group.broadcast(message, root)
        work.wait()
        if message.dtype == torch.uint8 and len(message) == self.size:
            message[17] ^= 1
        return work


@pytest.mark.parametrize("bucket", [64, 4096, 1 << 20])
def test_everyone_gets_everything_whatever_the_bucket(ends, bucket):
    for received in sent(ends, bucket):
        assert list(received) == list(WEIGHTS)
        for name, tensor in WEIGHTS.items():
            assert received[name].dtype == tensor.dtype
            assert torch.equal(received[name], tensor)


def test_a_bit_that_changes_on_the_way_is_named(ends):
    _, spoiled = sent(ends, 64, spoil=4000)
    assert "large was changed on its way between the pools" in str(spoiled)
