"""Checks of the simulated device, and of the npu backend on it. Run by session.py."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed
from torch_npu import dispatch

from rlcore import registry
from rlcore.checkpoint.state import load_generator, save_generator
from rlcore.distributed.fingerprint import fingerprint
from rlcore.distributed.snapshot import Snapshot
from rlcore.errors import ConfigError
from rlcore.runtime.memory import OffloadedTensors

NPU = registry.load("backends", "npu")
HERE = NPU().device(0)


def numbers(*shape):
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def test_values_and_views_are_those_of_the_processor():
    host, npu = numbers(4, 4), numbers(4, 4).to(HERE)
    for tensor in (host, npu):
        tensor[1:3].add_(1)
        tensor.t().mul_(tensor[0].clone())
        torch.mul(tensor, 2, out=tensor)
    assert torch.equal(npu.cpu(), host) and torch.equal((npu @ npu).cpu(), host @ host)
    assert npu.view(16).untyped_storage().data_ptr() == npu.untyped_storage().data_ptr()
    assert torch.add(npu, npu, out=torch.empty(0, device=HERE)).shape == npu.shape
    assert torch.equal(copy.deepcopy(npu).cpu(), host)


MIXED = {
    "add": lambda npu, host: npu + host,
    "into": lambda npu, host: npu.add_(host),
    "matmul": lambda npu, host: host @ npu,
    "cat": lambda npu, host: torch.cat([npu, host]),
    "where": lambda npu, host: torch.where(npu > 0, npu, host),
    "index": lambda npu, host: host[npu[0].long()],
    "embedding": lambda npu, host: functional.embedding(host.long(), npu),
    "integers": lambda npu, host: npu.long() @ npu.long(),
    "numpy": lambda npu, host: npu.numpy(),
    "another": lambda npu, host: torch.ones(2, device="npu:1"),
}


@pytest.mark.parametrize("operation", MIXED.values(), ids=MIXED)
def test_what_the_device_cannot_do_is_refused(operation):
    with pytest.raises((RuntimeError, TypeError)):
        operation(torch.ones(2, 2, device=HERE), torch.ones(2, 2))


def test_a_number_and_places_may_come_from_anywhere():
    assert torch.arange(3.0, device=HERE)[torch.tensor([2, 0])].tolist() == [2, 0]
    assert (torch.ones(2, device=HERE) * torch.tensor(3.0)).tolist() == [3, 3]


def test_draws_follow_the_seed_and_leave_the_processors_generator_alone(tmp_path):
    torch.manual_seed(3)
    host = torch.get_rng_state()
    first = torch.randn(4, device=HERE)
    save_generator(HERE, snapshot := Snapshot(tmp_path))
    snapshot.write()
    second, dropped = torch.randn(4, device=HERE), functional.dropout(torch.ones(64, device=HERE), 0.5)
    assert torch.equal(torch.get_rng_state(), host) and not torch.equal(first, second)
    load_generator(HERE, tmp_path)
    assert torch.equal(torch.randn(4, device=HERE), second), "the saved state goes on where it was"
    assert torch.equal(functional.dropout(torch.ones(64, device=HERE), 0.5), dropped)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4, device=HERE), first)


def test_a_saved_generator_says_nothing_to_another_device(tmp_path):
    save_generator(HERE, snapshot := Snapshot(tmp_path))
    snapshot.write()
    host = torch.get_rng_state()
    load_generator(torch.device("cpu"), tmp_path)
    assert torch.equal(torch.get_rng_state(), host)


def test_recomputed_layers_draw_again_what_they_drew():
    def dropped(x):
        return functional.dropout(x, 0.5)

    x = torch.ones(64, device=HERE, requires_grad=True)
    result = recomputed(dropped, x, use_reentrant=False)
    result.sum().backward()
    assert torch.equal(x.grad, result)


def test_parked_memory_is_garbage_and_comes_back():
    tensor = numbers(8).to(HERE)
    offloaded = OffloadedTensors(lambda: [tensor])
    offloaded.pause()
    assert offloaded.device_bytes() == 0 and tensor.isnan().all()
    offloaded.resume()
    assert offloaded.device_bytes() == 32 and torch.equal(tensor.cpu(), numbers(8))


@pytest.mark.parametrize("size", [3, 4096, 5000, 3_000_000])
def test_both_sides_of_a_weight_sync_read_the_same_fingerprint(size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    assert fingerprint(values.to(HERE)) == fingerprint(values)


def test_autocast_computes_in_what_it_is_told():
    layer = torch.nn.Linear(4, 4).to(HERE)
    with torch.autocast("npu", dtype=torch.bfloat16):
        result = layer(torch.ones(2, 4, device=HERE))
    result.sum().backward()
    assert result.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    assert NPU().default_precision() == "bf16"


def test_a_step_of_the_fused_optimizer_stays_on_the_device():
    layer = torch.nn.Linear(4, 4).to(HERE)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(2, 4, device=HERE)).sum().backward()
    dispatch.counts.clear()
    optimizer.step()
    assert dispatch.counts["aten::_fused_adamw_"] == 1
    assert {value.device for state in optimizer.state.values() for value in state.values()} == {HERE}


def test_transfer_to_npu_is_refused(monkeypatch):
    name = "torch_npu.contrib.transfer_to_npu"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(ConfigError, match="transfer_to_npu is active"):
        NPU().prepare()


def test_a_deterministic_run_asks_torch_to_be_so():
    try:
        NPU(NPU.Options(deterministic=True)).prepare()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
