"""Builds the roles of a worker."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from rlcore import registry
from rlcore.algorithms.task import TrainingTask
from rlcore.config.sections import CriticConfig
from rlcore.distributed.fsdp import Sharding
from rlcore.distributed.world import Ranks
from rlcore.errors import ConfigError
from rlcore.model.actor import LoraOffReference, TorchActor
from rlcore.model.critic import TorchCritic
from rlcore.model.forward import ForwardSettings
from rlcore.model.loaded import LoadedModel
from rlcore.model.loading import context_length
from rlcore.model.reference import TorchReference
from rlcore.model.resolved import ResolvedModel
from rlcore.model.vision import VisionEncoder, lone_tower, replace_tower
from rlcore.protocols import Reference, Rollout, VisionModelFamily


class Factory:
    """Builds roles of the resolved model for this rank."""

    def __init__(self, resolved: ResolvedModel, ranks: Ranks, beat: Callable[[], None]) -> None:
        """`beat`: called whenever a role finishes a packed row or an engine step."""
        self.resolved, self.config, self.ranks, self.beat = resolved, resolved.config, ranks, beat

    def policy(
        self, task: TrainingTask, folder: Path, trained: bool, compared: bool
    ) -> tuple[TorchActor | None, Reference | None]:
        """The actor, if it is trained here, and the reference, if log-probabilities are compared here."""
        resolved, actor = self.resolved, None
        module, weights_from = self._module(folder)
        settings = replace(self._settings(), temperature=task.temperature)
        switched = self.config.model.lora is not None and trained  # with LoRA off, the actor is the reference
        tower = resolved.encoder_tower(module)
        fixed = copy.deepcopy(module, {id(tower): tower}) if trained and compared and not switched else module
        loaded = LoadedModel(module, resolved.family, self._sharding(), weights_from, tower)
        if trained:
            actor = TorchActor(
                replace(loaded, module=resolved.trainable(module)), settings, task.objective, task.optimizer, task.schedule,
                resolved.backend.adamw, publish_lora=resolved.engine_lora is not None,
                routing_replay=task.routing_replay,
            )  # fmt: skip
        reference: Reference | None = None
        if compared and actor and switched:
            reference = LoraOffReference(actor)
        elif compared:
            reference = TorchReference(replace(loaded, module=fixed.requires_grad_(False)), settings)
        if actor and resolved.tower_folder:
            replace_tower(actor.model, resolved.family, resolved.tower_folder)
        return actor, reference

    def critic(self, task: TrainingTask, config: CriticConfig) -> TorchCritic:
        resolved = self.resolved
        module, weights_from = self._module(resolved.critic_folder())
        if (tower := resolved.encoder_tower(module)) is not None:
            tower.requires_grad_(False)
        loaded = LoadedModel(module, resolved.family, self._sharding(), weights_from)
        return TorchCritic(
            loaded, self._settings(), self.config.algorithm, config.optimizer, task.schedule, resolved.backend.adamw
        )

    def encoder(self, actor: TorchActor | None) -> VisionEncoder:
        """The vision encoder, with the actor's tower if that is in this process."""
        resolved = self.resolved
        if actor:
            tower = resolved.family.vision_tower(actor.model)
        else:
            tower = lone_tower(resolved.family, resolved.folder, resolved.tower_folder, resolved.settings.device)
        assert tower is not None, "images are read once only where there is a tower"
        family = cast(VisionModelFamily, resolved.family)  # a family whose models have a vision tower implements this protocol
        return VisionEncoder(tower, family, self._settings(), self.config.vision.images_per_batch)

    def rollout(self) -> Rollout:
        """The engine that the run file or the backend chooses, started; it gets its weights by `load_weights`."""
        config, resolved = self.config, self.resolved
        name = resolved.backend.default_engine if config.rollout.engine == "auto" else config.rollout.engine
        response = max(settings.max_new_tokens for settings in (config.rollout, *config.evaluation_sets.values()))
        longest, context = config.data.max_prompt_tokens + response, context_length(resolved.folder)
        if context is not None and longest > context:
            raise ConfigError(
                f"data.max_prompt_tokens: {config.data.max_prompt_tokens} and {response} new tokens are {longest}, more than"
                f" the {context} positions of {config.model.path}; lower it to {context - response} or less, or max_new_tokens"
            )
        return registry.load("rollout_engines", name)(
            family=resolved.family, folder=resolved.folder, backend=resolved.backend, config=config.rollout,
            dtype=resolved.settings.compute_dtype, max_tokens=longest, seed=config.seed, lora=resolved.engine_lora,
            beat=self.beat, image_embeds=config.model.images_are_read_once,
            temperatures=config.temperatures, experts=config.model.routing_replay,
        )  # fmt: skip

    @property
    def bucket_bytes(self) -> int:
        """Half of what may be gathered at once, since two buckets alternate."""
        return self.config.sharding.bucket_mib * 2**20 // 2

    def _module(self, folder: Path) -> tuple[torch.nn.Module, Path | None]:
        """A model; of a meta model, also the folder to read its weights from. LoRA needs a loaded base model."""
        resolved = self.resolved
        if self.ranks.mesh is None or not self.config.sharding.meta_init or self.config.model.lora:
            return resolved.prepared(resolved.load(folder)), None
        return resolved.prepared(resolved.family.meta_model(folder, torch.float32)), folder

    def _settings(self) -> ForwardSettings:
        """The model's forward settings, with this process's sequence-parallel group and heartbeat."""
        return replace(self.resolved.settings, sequence=self.ranks.sequence, beat=self.beat)

    def _sharding(self) -> Sharding | None:
        mesh, config, resolved = self.ranks.mesh, self.config.sharding, self.resolved
        if mesh is None:
            return None
        exchange = resolved.backend.exchange(mesh.get_group(mesh.ndim - 1), self.bucket_bytes)
        return Sharding(
            mesh, resolved.settings.compute_dtype, config.cpu_offload, exchange, self.bucket_bytes,
            reshard_after_forward=config.reshard_after_forward, sum_each=config.gradient_sync == "each",
        )  # fmt: skip
