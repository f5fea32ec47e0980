"""Two processes with a device each: collectives are exact, and a model sharded over both matches the goldens."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from rlcore.atomic import replace_file
from rlcore.diagnose.conformance import case
from rlcore.diagnose.conformance.measurement import Measurement
from rlcore.diagnose.conformance.numbers import LATER, LOSS, away, first_step, goldens
from rlcore.diagnose.conformance.section import Setup
from rlcore.distributed import world
from rlcore.distributed.broadcast import WeightBroadcast
from rlcore.distributed.fsdp import Sharding
from rlcore.errors import RunError
from rlcore.model.actor import TorchActor
from rlcore.model.optimizer import StepStatistics
from rlcore.model.packing import deal
from rlcore.types import Metrics

RANKS = 2
PATIENCE = 300  # seconds
BUCKET = 100_000  # bytes: some tensors share one, and some are larger
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # their names before torch 2.13
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def measure(setup: Setup) -> Iterator[Measurement]:
    if setup.device.type != "cpu" and torch.get_device_module(setup.device).device_count() < RANKS:
        yield Measurement("collectives, sharding, weights between pools", None, note=f"needs {RANKS} devices, one is here")
        return
    program = [sys.executable, "-m", "rlcore.diagnose.conformance.section", setup.config.model_dump_json(), str(setup.folder)]
    ranks = [subprocess.Popen([*program, "ranks.rank", str(rank)]) for rank in range(RANKS)]
    try:
        _wait(ranks)
    finally:
        for rank in ranks:
            rank.kill()
    for line in json.loads((setup.folder / "measurements.json").read_text(encoding="utf-8")):
        yield Measurement(**line)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for all ranks; RunError as soon as one fails, since the others may wait for it forever."""
    started = time.monotonic()
    while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
        if time.monotonic() - started > PATIENCE:
            raise RunError(f"no answer of the ranks within {PATIENCE} s: a collective hangs")
        time.sleep(0.1)
    if failed := [number for number, rank in enumerate(ranks) if rank.returncode]:
        raise RunError(f"rank {failed[0]} ended with status {ranks[failed[0]].returncode}; what it said stands above")


def _free() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def _met(folder: Path, rank: int) -> list[str]:
    """Two addresses of free ports, which the first rank finds when it has started: found earlier, others could take them."""
    meeting = folder / "addresses.json"
    if rank == 0:
        replace_file(meeting, json.dumps([_free(), _free()]))
    while not meeting.exists():
        time.sleep(0.05)
    return json.loads(meeting.read_text(encoding="utf-8"))


def rank(setup: Setup, number: str) -> None:
    """Program of one rank; the first writes the measurements of both."""
    mine, made = int(number), case.make("text", setup.folder / number)  # before joining: in a group, transformers saves on one
    address, link = _met(setup.folder, mine)
    device = setup.backend.device(mine)
    torch.get_device_module(device).set_device(device)
    ranks = world.join(mine, RANKS, address, setup.backend.collectives(), device, 1, 1)
    found = [*collectives(mine, device), *between_pools(setup, made, mine, device, link)]
    assert ranks.mesh is not None, "there are several ranks"
    for name, dtype in setup.dtypes.items():
        found += halves(made, Sharding(ranks.mesh, dtype), setup, mine, name)
    if mine == 0:
        (setup.folder / "measurements.json").write_text(json.dumps([asdict(one) for one in found]), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def collectives(mine: int, device: torch.device) -> Iterator[Measurement]:
    """Count wrong results, the most of any rank, on whole numbers, whose sums are exact in every order."""
    each = [torch.arange(1000.0) * (number + 1) for number in range(RANKS)]
    total = torch.stack(each).sum(0)
    for where in dict.fromkeys((device, torch.device("cpu"))):
        own, place = each[mine].to(where), where.type
        results = {"all_reduce": own.clone(), "all_reduce of maxima": own.clone(), "broadcast": own.clone()}
        expected = {"all_reduce": total, "all_reduce of maxima": each[-1], "broadcast": each[1]}
        dist.all_reduce(results["all_reduce"])
        dist.all_reduce(results["all_reduce of maxima"], dist.ReduceOp.MAX)
        dist.broadcast(results["broadcast"], 1)
        results["all_gather"], expected["all_gather"] = own.new_empty(RANKS * len(own)), torch.cat(each)
        _gather(results["all_gather"], own)
        results["reduce_scatter"], expected["reduce_scatter"] = own.new_empty(len(own) // RANKS), total.chunk(RANKS)[mine]
        _scatter(results["reduce_scatter"], own)
        for name, result in results.items():
            yield Measurement(f"{name} on {place}: wrong numbers", everyones(int((result.cpu() != expected[name]).sum())))


def between_pools(setup: Setup, made: case.Case, mine: int, device: torch.device, address: str) -> Iterator[Measurement]:
    """Send weights through the group that connects pools."""
    link = WeightBroadcast(setup.backend.group(address, mine, RANKS), device, BUCKET)
    weights = dict(made.actor(device, torch.float32, setup.backend).weights())
    if mine == 0:
        link.send(weights.items())
        wrong = 0
    else:
        received = {name: tensor.clone() for name, tensor in link.receive()}
        wrong = len(weights.keys() ^ received.keys())
        wrong += sum(not torch.equal(weights[name], tensor) for name, tensor in received.items() if name in weights)
    yield Measurement("weights between pools: tensors that arrive changed", everyones(wrong))


def halves(made: case.Case, sharding: Sharding, setup: Setup, mine: int, name: str) -> Iterator[Measurement]:
    """Train a model sharded over the ranks, each with its part of the groups."""
    dtype, golden = sharding.compute_dtype, goldens("text")
    actor = made.actor(setup.backend.device(mine), dtype, setup.backend, sharding)
    title = f"half a model on each, {name}"
    first, *_ = [step(actor, made, mine) for _ in range(case.STEPS)]
    yield from first_step(title, first, golden, LOSS[dtype])
    later = everyones(away(actor, made, golden["logprobs_after"]))
    yield Measurement(f"{title}: log-probabilities after {case.STEPS} steps", later, LATER[dtype])


def step(actor: TorchActor, made: case.Case, mine: int) -> Metrics:
    """Run one optimizer step on all ranks; returns its metrics."""
    (batch,) = actor.schedule.steps(made.batch, actor.objective, actor.learner.steps)
    statistics_of_ranks: list[Any] = [None] * RANKS
    dist.all_gather_object(statistics_of_ranks, actor.step(deal(batch, RANKS, case.CAP)[mine][0]))
    total = StepStatistics()
    for statistics in statistics_of_ranks:
        total += statistics
    return total.metrics(batch.denominator)


def everyones(mine: float) -> float:
    """Maximum over the ranks."""
    found: list[Any] = [None] * RANKS
    dist.all_gather_object(found, mine)
    return float(max(found))

