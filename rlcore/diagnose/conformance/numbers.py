"""A whole model on the device against the goldens: log-probabilities, the loss and its gradient, optimizer steps. Also
checkpoints that move between devices, and restored random states."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

import torch

from rlcore.checkpoint.state import load_generator, random_states, restore_random_states, save_generator
from rlcore.diagnose.conformance import case
from rlcore.diagnose.conformance.case import ALGORITHM, STEPS, Case
from rlcore.diagnose.conformance.measurement import Measurement
from rlcore.diagnose.conformance.section import Setup
from rlcore.distributed.snapshot import Snapshot
from rlcore.model.actor import TorchActor
from rlcore.types import Metrics

HOST = torch.device("cpu")
LOGPROBS = {torch.float32: 5e-5, torch.bfloat16: 0.2}  # nats
LOSS = {torch.float32: 5e-5, torch.bfloat16: 0.1}  # relative
LATER = {torch.float32: 2e-4, torch.bfloat16: 1.2}  # nats; the steps move log-probabilities by up to 7
ANOTHER = "transformers or tokenizers of other versions make other inputs: the numbers of this model cannot be compared"


def measure(setup: Setup) -> Iterator[Measurement]:
    cases = {kind: case.make(kind, setup.folder / kind) for kind in case.SOURCES}
    for kind, made in cases.items():
        golden = goldens(kind)
        another = made.mark != golden["mark"]
        yield Measurement(f"{kind}: models or batches that are not the goldens'", float(another), note=another * ANOTHER)
        for name, dtype in setup.dtypes.items():
            yield from compared(f"{kind}, {name}", made, golden, made.actor(setup.device, dtype, setup.backend))
    yield from carried(setup, cases["text"])
    yield Measurement("numbers that a restored generator draws otherwise", redrawn(setup))


def goldens(kind: str) -> Mapping[str, Any]:
    return json.loads((files("rlcore.diagnose.conformance") / "goldens.json").read_text(encoding="utf-8"))[kind]


def compared(title: str, made: Case, golden: Mapping[str, Any], actor: TorchActor) -> Iterator[Measurement]:
    dtype = actor.settings.compute_dtype
    yield Measurement(f"{title}: log-probabilities", away(actor, made, golden["logprobs"]), LOGPROBS[dtype])
    yield from first_step(title, actor.update(made.batch), golden, LOSS[dtype])
    for _ in range(STEPS - 1):
        actor.update(made.batch)
    later = away(actor, made, golden["logprobs_after"])
    yield Measurement(f"{title}: log-probabilities after {STEPS} steps", later, LATER[dtype])


def first_step(title: str, metrics: Metrics, golden: Mapping[str, Any], limit: float) -> Iterator[Measurement]:
    """Compare the loss and gradient norm of an optimizer step."""
    yield Measurement(f"{title}: loss", abs(loss(metrics, "actor/") / loss(golden) - 1), limit)
    yield Measurement(f"{title}: gradient norm", abs(metrics["grad_norm"] / golden["grad_norm"] - 1), limit)


def away(actor: TorchActor, made: Case, expected: Sequence[float]) -> float:
    """Largest absolute error of a log-probability."""
    return float((actor.logprobs(made.batch) - torch.tensor(expected)).abs().max())


def loss(parts: Mapping[str, float], prefix: str = "") -> float:
    pg, kl, entropy = (parts[f"{prefix}{name}"] for name in ("pg_loss", "kl_loss", "entropy"))
    return pg + ALGORITHM.kl_coef * kl - ALGORITHM.entropy_coef * entropy


def carried(setup: Setup, made: Case) -> Iterator[Measurement]:
    """Save after a step on one device, load on the other, and compare the next step with that of the actor that stayed."""

    def fresh(host: bool) -> TorchActor:
        return made.actor(HOST, torch.float32) if host else made.actor(setup.device, torch.float32, setup.backend)

    for host, way in ((False, "device to processor"), (True, "processor to device")):
        stayed, went, folder = fresh(host), fresh(not host), setup.folder / way
        stayed.update(made.batch)
        folder.mkdir()
        stayed.save(snapshot := Snapshot(folder))
        snapshot.write()
        went.load(folder)
        found: list[Metrics] = [actor.update(made.batch) for actor in (stayed, went)]
        apart = away(went, made, stayed.logprobs(made.batch).tolist()) + abs(found[0]["lr"] - found[1]["lr"])
        yield Measurement(f"checkpoint, {way}: log-probabilities a step later", apart, LATER[torch.float32])


def redrawn(setup: Setup) -> float:
    """Number of device draws, dropout included, that differ after the random states are restored."""

    def draw() -> torch.Tensor:
        ones = torch.ones(1000, device=setup.device)
        return torch.cat([torch.rand(1000, device=setup.device), torch.nn.functional.dropout(ones)]).cpu()

    states = random_states()
    save_generator(setup.device, snapshot := Snapshot(setup.folder))
    snapshot.write()
    first = draw()
    draw()
    restore_random_states(states)
    load_generator(setup.device, setup.folder)
    return float((draw() != first).sum())
