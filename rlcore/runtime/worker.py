"""The roles of one process on one device, and the weight sync between them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from rlcore.algorithms.task import TrainingTask, training_task
from rlcore.checkpoint.folder import writing
from rlcore.checkpoint.state import load_generator, save_generator, seed_random_states
from rlcore.config.placement import ROLES
from rlcore.distributed import world
from rlcore.distributed.broadcast import WeightBroadcast
from rlcore.distributed.fsdp import Sharding
from rlcore.errors import ConfigError
from rlcore.model.actor import LoraOffReference, TorchActor
from rlcore.model.critic import TorchCritic
from rlcore.model.forward import ForwardSettings
from rlcore.model.loaded import LoadedModel
from rlcore.model.optimizer import Learner, StepStatistics
from rlcore.model.reference import TorchReference
from rlcore.model.resolved import ResolvedModel
from rlcore.model.vision import VisionEncoder, lone_tower, replace_tower
from rlcore.monitor.clock import Clock, Span
from rlcore.monitor.heartbeat import Heartbeat
from rlcore.protocols import Rollout, VisionModelFamily
from rlcore.runtime.factory import start_rollout
from rlcore.runtime.memory import MemoryManager, OffloadedTensors, memory
from rlcore.types import Batch, Metrics, Prompt, Receipt, Sample, Sampling, Vision

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
        self.encoder: VisionEncoder | None = None
        self.actor: TorchActor | None = None
        self.reference: TorchReference | LoraOffReference | None = None
        self.critic: TorchCritic | None = None
        self.rollout: Rollout | None = None
        self._broadcast: WeightBroadcast | None = None

    def join(self, rank: int, size: int, address: str) -> None:
        """Join the process group whose rendezvous is at `address` (host:port)."""
        backend, config = self.resolved.backend, self.config.sharding
        self.ranks = world.join(
            rank, size, address, backend.collectives(), self.resolved.settings.device, config.replicas, config.sequence_parallel
        )

    def start_engine(self) -> None:
        """Start the engine; it gets its weights by `sync` or `receive`."""
        if "rollout" in self.roles:
            self.rollout = start_rollout(self.resolved, self.heartbeat.beat)
            self.memory_manager.register("engine", self.rollout)

    def load(self, command: str, folder: Path | None = None) -> None:
        """Load the models of a command, from `folder` or the run's initial model. The reference keeps these weights."""
        self.encoder = self.actor = self.reference = self.critic = None
        task, trained = training_task(command, self.config), "actor" in self.roles
        compared = task.compared and "reference" in self.roles
        if trained or compared:
            seed_random_states(self.config.seed)  # same on every rank
            self._build(task, folder or self.resolved.folder, trained, compared)
        if "vision" in self.roles and self.config.model.images_are_read_once:
            self.encoder = self._encoder()
        if trained and command == "grpo" and self.config.critic:
            model, source = self._model(self.resolved.critic_folder())
            if (tower := self.resolved.encoder_tower(model)) is not None:
                tower.requires_grad_(False)
            self.critic = TorchCritic(
                LoadedModel(model, self.resolved.family, self._sharding(), source), self._settings(), self.config.algorithm,
                self.config.critic.optimizer, task.schedule, self.resolved.backend.adamw,
            )  # fmt: skip
        self._register_memory()

    def _model(self, folder: Path) -> tuple[torch.nn.Module, Path | None]:
        """A model; of a meta model, also the folder to read its weights from. LoRA needs a loaded base model."""
        resolved = self.resolved
        if self.ranks.mesh is None or not self.config.sharding.meta_init or self.config.model.lora:
            return resolved.backend.fuse(resolved.load(folder)), None
        return resolved.backend.fuse(resolved.family.meta_model(folder, torch.float32)), folder

    def _build(self, task: TrainingTask, folder: Path, trained: bool, compared: bool) -> None:
        resolved = self.resolved
        model, source = self._model(folder)
        settings = replace(self._settings(), temperature=task.temperature)
        additions = self.config.model.lora is not None and trained  # with LoRA off, the model is the reference
        tower = resolved.encoder_tower(model)
        fixed = copy.deepcopy(model, {id(tower): tower}) if trained and compared and not additions else model
        loaded = LoadedModel(model, resolved.family, self._sharding(), source, tower)
        if trained:
            self.actor = TorchActor(
                replace(loaded, module=resolved.trainable(model)), settings, task.objective, task.optimizer, task.schedule,
                resolved.backend.adamw, publish_lora=resolved.additions is not None,
            )  # fmt: skip
        if compared:
            self.reference = LoraOffReference(self.actor) if self.actor and additions else TorchReference(
                replace(loaded, module=fixed.requires_grad_(False)), settings
            )  # fmt: skip
        if self.actor and resolved.tower_folder:
            replace_tower(self.actor.model, resolved.family, resolved.tower_folder)

    def _encoder(self) -> VisionEncoder:
        """Build the vision encoder, with the actor's tower if that is in this process."""
        resolved = self.resolved
        if self.actor:
            tower = resolved.family.vision_tower(self.actor.model)
        else:
            tower = lone_tower(resolved.family, resolved.folder, resolved.tower_folder, resolved.settings.device)
        family = cast(VisionModelFamily, resolved.family)  # a family whose models have a vision tower implements this protocol
        return VisionEncoder(_there(tower), family, self._settings(), self.config.vision.images_per_batch)

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
        """Yield (index in the whole call, samples) of each prompt as it finishes. All processes of one engine draw the same
        samples; the one that `answers` yields them."""
        prompts, sampling = part
        with self.memory_manager.phase("infer", "rollout"):
            if prompts:
                for place, group in _there(self.rollout).stream(prompts, sampling):
                    if answers:
                        yield sampling.first + place, group.samples

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
        self._broadcast = WeightBroadcast(group, self.resolved.settings.device, self._bucket)

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
        with self.memory_manager.phase("save"), writing():
            _there(self.actor).save(folder)
            save_generator(self.resolved.settings.device, folder)
            if self.critic:
                self.critic.save(folder / "critic")

    def restore(self, folder: Path) -> int:
        """Load a checkpoint; returns its number of optimizer steps."""
        actor = _there(self.actor)
        with self.memory_manager.phase("save"):
            actor.load(folder)
            load_generator(self.resolved.settings.device, folder)
            if self.critic:
                self.critic.load(folder / "critic")
        return actor.learner.steps

    def now(self) -> float:
        return time.perf_counter()

    def spans(self) -> list[Span]:
        """Spans since the last call, on this process's clock."""
        return self.clock.take()

    def memory(self) -> Metrics:
        return {**memory(self.resolved.settings.device), **self.memory_manager.memory()}

    def _settings(self) -> ForwardSettings:
        """The model's forward settings, with this process's sequence-parallel group and heartbeat."""
        return replace(self.resolved.settings, sequence=self.ranks.sequence, beat=self.heartbeat.beat)

    def _sharding(self) -> Sharding | None:
        mesh, config, backend = self.ranks.mesh, self.config.sharding, self.resolved.backend
        if mesh is None:
            return None
        exchange = backend.exchange(mesh.get_group(mesh.ndim - 1), self._bucket)
        return Sharding(
            mesh, self.resolved.settings.compute_dtype, config.cpu_offload, exchange, self._bucket,
            sum_each=config.gradient_sync == "each",
        )  # fmt: skip

    @property
    def _bucket(self) -> int:
        """Bucket size in bytes: half of what may be gathered at once, since two buckets alternate."""
        return self.config.sharding.bucket_mib * 2**20 // 2


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
