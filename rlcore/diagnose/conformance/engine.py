"""Engine section: it serves the weights the actor sent, verifies them, and keeps them while paused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rlcore.data.sources import training_prompts
from rlcore.diagnose.conformance.measurement import Measurement
from rlcore.diagnose.conformance.section import Setup
from rlcore.errors import RunError
from rlcore.model.resolved import ResolvedModel
from rlcore.runtime.memory import PhaseError
from rlcore.runtime.worker import Worker
from rlcore.types import Batch, Group, NamedTensors, Sampling

MISMATCH = {torch.float32: 1e-3, torch.bfloat16: 0.3}  # nats, maximum over all tokens
SAMPLING = Sampling(samples=4, max_new_tokens=12, seed=3)
FAULTS: Mapping[str, Callable[[list[tuple[str, Tensor]]], NamedTensors]] = {
    "one is missing": lambda named: named[:3] + named[4:],
    "one is of no such model": lambda named: [*named, ("model.layers.0.nothing.weight", torch.ones(4))],
    "one has another shape": lambda named: [(named[0][0], named[0][1][:-1]), *named[1:]],
}


def measure(setup: Setup) -> Iterator[Measurement]:
    resolved = ResolvedModel(setup.config, setup.backend)
    prompts = training_prompts(setup.config.data, resolved.family, seed=0).draw(3)
    worker = Worker(resolved)
    worker.load("grpo")
    worker.start_engine()
    actor, rollout = worker.actor, worker.rollout
    assert actor is not None and rollout is not None
    for version, which in enumerate(("first", "changed"), start=1):
        rollout.load_weights(actor.weights(), version)
        batch = Batch.of(rollout.generate(prompts, SAMPLING))
        gap = float((actor.logprobs(batch) - batch.rollout_logprobs).abs().max())
        yield Measurement(
            f"{which} weights: log-probabilities, engine to actor", gap, MISMATCH[resolved.settings.compute_dtype]
        )
        stale = sum(sample.policy_version != version for sample in batch.samples)
        yield Measurement(f"{which} weights: samples under another version", float(stale))
        shift(actor.model)
    rollout.load_weights(actor.weights(), 3)
    groups = rollout.generate(prompts, SAMPLING)
    yield Measurement("samples that the same call draws otherwise", unlike(groups, rollout.generate(prompts, SAMPLING)))
    for fault, spoilt in FAULTS.items():
        accepted = not raises(RunError, lambda spoilt=spoilt: rollout.load_weights(spoilt(list(actor.weights())), 4))
        yield Measurement(f"tensors sent, {fault}: updates accepted", float(accepted))
    rollout.load_weights(actor.weights(), 5)
    yield Measurement("samples that differ after refused updates", unlike(groups, rollout.generate(prompts, SAMPLING)))
    before = rollout.device_bytes()
    rollout.pause()
    yield Measurement("paused: part of its memory that stays on the device", rollout.device_bytes() / before, 0.999)
    answered = not raises(PhaseError, lambda: rollout.generate(prompts, SAMPLING))
    yield Measurement("paused: calls that are answered", float(answered))
    rollout.resume()
    try:
        yield Measurement("resumed: samples that differ", unlike(groups, rollout.generate(prompts, SAMPLING)))
    except PhaseError as error:
        yield Measurement("resumed: samples that differ", None, note=f"it keeps no weights: {error}")
    rollout.load_weights(actor.weights(), 6)
    yield Measurement("resumed and updated: samples that differ", unlike(groups, rollout.generate(prompts, SAMPLING)))


@torch.no_grad()
def shift(model: torch.nn.Module) -> None:
    """Change every weight, so that one that is not synced shows."""
    for number, weight in enumerate(model.parameters()):
        weight.mul_(1 + 0.1 * (1 + number % 3))


def raises(kind: type[Exception], call: Callable[[], object]) -> bool:
    try:
        call()
    except kind:
        return True
    return False


def unlike(groups: Sequence[Group], others: Sequence[Group]) -> float:
    """Number of samples whose tokens differ."""
    drawn = [[sample.token_ids.tolist() for group in each for sample in group.samples] for each in (groups, others)]
    return float(sum(one != other for one, other in zip(*drawn, strict=True)))
