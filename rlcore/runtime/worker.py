"""The roles of one process on one device: what a placement calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from rlcore.algorithms.task import training_task
from rlcore.checkpoint.state import load_generator, save_generator, seed_random_states
from rlcore.config.placement import ROLES
from rlcore.distributed import world
from rlcore.distributed.broadcast import WeightBroadcast
from rlcore.distributed.snapshot import Snapshot
from rlcore.errors import ConfigError, EngineFailed, RlcoreError
from rlcore.model.actor import LoraOffReference, TorchActor
from rlcore.model.critic import TorchCritic
from rlcore.model.optimizer import Learner, StepStatistics
from rlcore.model.reference import TorchReference
from rlcore.model.resolved import ResolvedModel
from rlcore.model.vision import VisionEncoder
from rlcore.monitor.clock import Clock, Span
from rlcore.monitor.heartbeat import Heartbeat
from rlcore.protocols import Reference, Rollout
from rlcore.runtime.factory import Factory
from rlcore.runtime.memory import MemoryManager, OffloadedTensors, memory
from rlcore.types import Batch, Group, Metrics, Prompt, Receipt, Sample, Sampling, Vision

T = TypeVar("T")


class Worker:
    """The roles of one process on one device. A placement calls its methods on all ranks of a pool together."""

    def __init__(
        self, resolved: ResolvedModel, roles: Collection[str] = ROLES, heartbeat: Heartbeat | None = None,
        put: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:  # fmt: skip
        """`heartbeat`: beats whenever a role finishes a piece of work. `put`: turns a tensor of an answer into a reference, for
        answers that other workers read and the controller does not."""
        self._put = put
        self.resolved, self.config, self.roles = resolved, resolved.config, frozenset(roles)
        self.heartbeat = heartbeat or Heartbeat()
        device = resolved.settings.device
        if not torch.get_device_module(device).is_available():
            raise ConfigError(
                f"backend.name {resolved.backend.name}: this process sees no {device.type} device; look at what is plugged in,"
                " at its driver, and at the variables that hide devices, or choose another backend"
            )
        self.clock = Clock(finish=partial(torch.get_device_module(device).synchronize, device))
        self.memory_manager = MemoryManager(self.clock, self.config.placement.offload)
        self.ranks = world.ALONE
        self.whole_groups = False  # whether the loss needs all samples of a group in one forward pass
        self.encoder: VisionEncoder | None = None
        self.actor: TorchActor | None = None
        self.reference: Reference | None = None
        self.critic: TorchCritic | None = None
        self.rollout: Rollout | None = None
        self._broadcast: WeightBroadcast | None = None
        self._snapshot: Snapshot | None = None  # the last one

    def join(self, rank: int, size: int, address: str) -> None:
        """Join the process group whose rendezvous is at `address` (host:port)."""
        backend, config = self.resolved.backend, self.config.sharding
        replicas = size if config.replicas == "all" else config.replicas
        self.ranks = world.join(
            rank, size, address, backend.collectives(), self.resolved.settings.device, replicas, config.sequence_parallel
        )

    def start_engine(self) -> None:
        """Start the engine; it gets its weights by `sync` or `receive`."""
        if "rollout" in self.roles:
            self.rollout = self._factory.rollout()
            self.memory_manager.register("engine", self.rollout)

    def load(self, command: str, folder: Path | None = None, steps: int | None = None) -> None:
        """Load the models of a command, from `folder` or the run's initial model. The reference keeps these weights. `steps`:
        of the whole run, where the run file gives epochs."""
        self.encoder = self.actor = self.reference = self.critic = None
        task, trained = training_task(command, self.config, steps), "actor" in self.roles
        compared = task.with_reference and "reference" in self.roles
        self.whole_groups = task.objective.whole_groups
        factory = self._factory
        if trained or compared:
            seed_random_states(self.config.seed)  # same on every rank
            self.actor, self.reference = factory.policy(task, folder or self.resolved.folder, trained, compared)
        self.load_encoder()
        if trained and command == "grpo" and self.config.critic:
            self.critic = factory.critic(task, self.config.critic)
        self._register_memory()

    def load_encoder(self) -> None:
        """Load the vision encoder, if images are read once and here."""
        if "vision" in self.roles and self.config.model.images_are_read_once:
            self.encoder = self._factory.encoder(self.actor)

    def _register_memory(self) -> None:
        """Register each role's tensors with the memory manager."""
        trained = [role for role in (self.actor, self.critic) if role]
        learners = [role.learner for role in trained]
        fixed = self.reference.forward if isinstance(self.reference, TorchReference) else None
        tower = self.resolved.encoder_tower(self.actor.model) if self.actor else self.encoder.tower if self.encoder else None
        self.memory_manager.register("vision", OffloadedTensors(tower.parameters) if tower is not None else None)
        self.memory_manager.register("parameters", OffloadedTensors(lambda: _weights(trained, tower)) if trained else None)
        self.memory_manager.register("optimizer", OffloadedTensors(lambda: _moments(learners)) if learners else None)
        self.memory_manager.register("reference", OffloadedTensors(lambda: _tensors(fixed, tower)) if fixed else None)
        for learner in learners:
            learner.optimizer.register_step_pre_hook(
                lambda optimizer, *_: self.memory_manager.note("train", _gradients(optimizer))
            )

    def embed(self, visions: Sequence[Vision | None]) -> list[Vision | None]:
        """Encode each prompt's images. The embeddings stay where the roles that read them next can get them (`put`)."""
        with self.memory_manager.phase("encode", "image_embeds"):
            read = _there(self.encoder).read(visions)
        return [vision and {**vision, "image_embeds": self._put(vision["image_embeds"])} for vision in read]

    def generate(
        self, part: tuple[Sequence[Prompt], Sampling], answers: bool = True
    ) -> Iterator[tuple[int, Sequence[Sample]]]:
        """Yield (global index, samples) of each prompt as it finishes. All processes of one engine draw the same
        samples; the one that `answers` yields them."""
        prompts, sampling = part
        with self.memory_manager.phase("infer", "rollout"):
            if prompts:
                for place, group in self._sampled(prompts, sampling):
                    if answers:
                        yield sampling.first + place, group.samples

    def _sampled(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, Group]]:
        """EngineFailed for an error of the engine other than a failed allocation."""
        try:
            yield from _there(self.rollout).stream(prompts, sampling)
        except RlcoreError:
            raise
        except Exception as error:
            if self.resolved.backend.shortage(error):
                raise
            again = "--resume, or placement.max_restarts, goes on from the last checkpoint"
            raise EngineFailed(f"the engine failed while sampling: {error!r}; {again}") from error

    def served(self) -> int | None:
        """Version of the weights in this process's engine; None if they must be sent again."""
        return _there(self.rollout).version

    def sync(self, version: int) -> Receipt:
        """Load the weights of this process's actor into its engine."""
        with self.memory_manager.phase("reshard", "resharding_to_infer"):
            return _there(self.rollout).load_weights(_there(self.actor).weights(), version)

    def connect_broadcast(self, rank: int, size: int, address: str) -> None:
        """Join the group that broadcasts weights to the engines of other pools; rank 0 sends."""
        group = self.resolved.backend.group(address, rank, size)
        self._broadcast = WeightBroadcast(group, self.resolved.settings.device, self._factory.bucket_bytes)

    def send(self) -> None:
        """All-gather the actor's weights on every rank; the first rank sends them."""
        with self.memory_manager.phase("send", "resharding_to_infer"):
            weights = _there(self.actor).weights()
            if world.first():
                _there(self._broadcast).send(weights)
            else:
                for _ in weights:
                    pass

    def receive(self, version: int) -> Receipt:
        """Load the weights that are being sent into this process's engine."""
        with self.memory_manager.phase("reshard", "resharding_to_infer"):
            return _there(self.rollout).load_weights(_there(self._broadcast).receive(), version)

    def reference_logprobs(self, batch: Batch) -> Tensor:
        phase = "score" if isinstance(self.reference, LoraOffReference) else "reference"
        with self.memory_manager.phase(phase, "reference_model"):
            return _there(self.reference).logprobs(batch)

    def logprobs(self, batch: Batch) -> Tensor:
        with self.memory_manager.phase("score", "old_log_p"):
            return _there(self.actor).logprobs(batch)

    def values(self, batch: Batch) -> Tensor:
        with self.memory_manager.phase("score", "values"):
            return _there(self.critic).values(batch)

    def update(self, steps: Sequence[Batch]) -> list[StepStatistics]:
        """Run this rank's part of each optimizer step."""
        with self.memory_manager.phase("train", "update"):
            return [_there(self.actor).step(step) for step in steps]

    def update_critic(self, steps: Sequence[Batch]) -> list[StepStatistics]:
        with self.memory_manager.phase("train", "update"):
            return [_there(self.critic).step(step) for step in steps]

    def save(self, folder: Path) -> None:
        """Copy this rank's part of a checkpoint; it is written to `folder` while training goes on."""
        self._snapshot = Snapshot(folder, self.ranks.rank, self.ranks.size)
        with self.memory_manager.phase("save"):
            _there(self.actor).save(self._snapshot)
            save_generator(self.resolved.settings.device, self._snapshot)
            if self.critic:
                self.critic.save(self._snapshot)
        self._snapshot.begin()

    def unwritten(self) -> str | None:
        """Why this rank's part of the last checkpoint could not be written."""
        return self._snapshot.fault if self._snapshot else None

    def restore(self, folder: Path) -> int:
        """Load a checkpoint; returns its number of optimizer steps."""
        actor = _there(self.actor)
        with self.memory_manager.phase("save"):
            actor.load(folder)
            load_generator(self.resolved.settings.device, folder)
            if self.critic:
                self.critic.load(folder)
        return actor.learner.steps

    def steps_taken(self) -> set[int]:
        """Numbers of optimizer steps that actor and critic have taken; they differ if an update broke off between the two."""
        return {role.learner.steps for role in (self.actor, self.critic) if role}

    def now(self) -> float:
        return time.perf_counter()

    def spans(self) -> list[Span]:
        """Spans since the last call, on this process's clock."""
        return self.clock.take()

    def memory(self) -> Metrics:
        return {**memory(self.resolved.settings.device), **self.memory_manager.memory()}

    @property
    def _factory(self) -> Factory:
        return Factory(self.resolved, self.ranks, self.heartbeat.beat)


def _weights(roles: Sequence[TorchActor | TorchCritic], tower: torch.nn.Module | None) -> Iterator[Tensor]:
    """Parameters of the roles, and the working copies that they run on."""
    for role in roles:
        yield from _tensors(role.forward, tower)
        yield from role.working.tensors()


def _tensors(module: torch.nn.Module, without: torch.nn.Module | None) -> Iterator[Tensor]:
    left_out = {id(tensor) for tensor in without.parameters()} if without is not None else set()
    return (tensor for tensor in module.parameters() if id(tensor) not in left_out)


def _moments(learners: Sequence[Learner]) -> Iterator[Tensor]:
    states = (state for learner in learners for state in learner.optimizer.state.values())
    return (value for state in states for value in state.values() if isinstance(value, Tensor) and value.dim())


def _gradients(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the gradients on this rank."""
    weights = (weight for group in optimizer.param_groups for weight in group["params"])
    return sum(world.part(weight.grad).nbytes for weight in weights if weight.grad is not None)


def _there(role: T | None) -> T:
    assert role is not None, "a placement calls a worker for the roles it has"
    return role
