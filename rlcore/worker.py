"""The roles of one process on one device, and the weights that pass between them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlcore import lora, registry
from rlcore.algorithms.loss import objective
from rlcore.config import LoraConfig, ModelConfig, RunConfig, nearest
from rlcore.critic import TorchCritic
from rlcore.data import PromptSource, load_rows
from rlcore.errors import ConfigError
from rlcore.models import adapter_for, context_length, resolve
from rlcore.policy import AdapterOffReference, ForwardSettings, Passes, TorchActor, TorchReference
from rlcore.protocols import Backend, Reward, Rollout
from rlcore.types import Batch, Metrics, Receipt
from rlcore.vision import ImageCache

MODEL_CACHE = Path.home() / ".cache" / "rlcore" / "models"
EMULATED = (
    "model.precision bf16: this {} has no bf16 instructions, and emulating them takes a hundred times as long as fp32;"
    " model.precision=auto takes the fast one"
)


class Policy:
    """The model that is trained, and how it is run: what every role on this device is made from."""

    def __init__(self, config: RunConfig, backend: Backend) -> None:
        self.config, self.backend = config, backend
        backend.prepare()
        self.folder = resolve(config.model, MODEL_CACHE)
        self.adapter = adapter_for(self.folder, config.model)
        fast = backend.default_precision()
        self.precision = precision = fast if config.model.precision == "auto" else config.model.precision
        self.caution = EMULATED.format(backend.name) if precision == "bf16" != fast else None
        self.settings = ForwardSettings(
            device=backend.device(0),
            compute_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            max_tokens=config.train.max_tokens_per_microbatch,
            temperature=config.rollout.temperature,
        )

    def load(self, folder: Path | None = None) -> torch.nn.Module:
        """The weights of `folder`, or the ones the run starts from, in float32 on the device."""
        return self.adapter.load(folder or self.folder, torch.float32).to(self.settings.device)

    def load_critic(self) -> torch.nn.Module:
        """The model that the critic starts from."""
        settings = self.config.critic
        assert settings is not None
        if settings.path is None:
            return self.load()
        folder = resolve(ModelConfig(path=settings.path), MODEL_CACHE)
        return adapter_for(folder, self.config.model).load(folder, torch.float32).to(self.settings.device)

    def trainable(self, model: torch.nn.Module) -> torch.nn.Module:
        """`model` with what the run file says of training it: frozen parts, low-rank additions, checkpointed layers."""
        config = self.config.model
        tower = self.adapter.vision_tower(model)
        for part in config.freeze:
            self._freeze(model, part, tower)
        if config.lora:
            model = lora.attach(model, config.lora, self.adapter.head(model), _frozen(model))
        if self.config.train.gradient_checkpointing:
            _checkpoint_layers(model)
        return model

    def image_cache(self, model: torch.nn.Module) -> ImageCache | None:
        """Where nothing of the vision tower learns, each image need be encoded only once."""
        tower = self.adapter.vision_tower(model)
        frozen = tower is not None and not any(parameter.requires_grad for parameter in tower.parameters())
        return ImageCache() if frozen else None

    @property
    def additions(self) -> LoraConfig | None:
        """Set where the engine is sent low-rank additions alone."""
        settings = self.config.model.lora
        return settings if settings and settings.sync == "adapter" else None

    @property
    def given(self) -> ForwardSettings:
        """For responses that nobody sampled: their probabilities are the model's own."""
        return replace(self.settings, temperature=1.0)

    @property
    def passes(self) -> Passes:
        train = self.config.train
        each = train.minibatches_per_step * train.epochs_per_step
        return Passes(train.steps * each, train.minibatches_per_step, train.epochs_per_step, self.config.seed)

    def _freeze(self, model: torch.nn.Module, part: str, tower: torch.nn.Module | None) -> None:
        """ConfigError when nothing of the model is called so."""
        if part == "vision" and tower is not None:
            tower.requires_grad_(False)
            return
        names = {self.adapter.published_name(name): parameter for name, parameter in model.named_parameters()}
        chosen = [parameter for name, parameter in names.items() if name == part or name.startswith(f"{part}.")]
        if not chosen:
            parts = sorted({name.split(".")[0] for name in names} | {".".join(name.split(".")[:2]) for name in names})
            raise ConfigError(f"model.freeze: no weight of {self.config.model.path} starts with {part!r}{nearest(part, parts)}")
        for parameter in chosen:
            parameter.requires_grad_(False)

    def prompts(self, seed: int) -> PromptSource:
        """The training rows, shuffled by `seed`."""
        data = self.config.data
        return PromptSource(load_rows(data.train), self.adapter, data.max_prompt_tokens, data.long_prompts, seed)


def reference_of(policy: Policy, model: torch.nn.Module, settings: ForwardSettings) -> tuple[TorchReference, torch.nn.Module]:
    """`model` as it is now, for comparison, and as it will learn. With low-rank additions one set of weights is both."""
    kind, same = (AdapterOffReference, None) if policy.config.model.lora else (TorchReference, copy.deepcopy(model))
    model = policy.trainable(model)
    fixed = model if same is None else same.requires_grad_(False)
    return kind(fixed, policy.adapter, settings, policy.image_cache(model)), model


def _frozen(model: torch.nn.Module) -> set[str]:
    """Layers none of whose weights learn."""
    return {
        name for name, layer in model.named_modules()
        if (weights := list(layer.parameters(recurse=False))) and not any(weight.requires_grad for weight in weights)
    }  # fmt: skip


def _checkpoint_layers(model: Any) -> None:
    """Only the checkpointed layers themselves are told that they train: dropout below them stays off."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # after the backend has made it importable

    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True


class Worker:
    """Actor, reference, critic, rollout and reward in this process."""

    def __init__(self, policy: Policy, model: torch.nn.Module, rollout: Rollout, reward: Reward) -> None:
        """`model` is the initial policy; the reference stays what it is now."""
        config, algorithm = policy.config, policy.config.algorithm
        adapter, settings = policy.adapter, policy.settings
        self.reference: TorchReference | None = None
        if algorithm.kl_coef:
            self.reference, model = reference_of(policy, model, settings)
            self.images = self.reference.images
        else:
            model = policy.trainable(model)
            self.images = policy.image_cache(model)
        self.actor = TorchActor(
            model, adapter, settings, objective(algorithm, config.rollout.max_new_tokens), config.optimizer, policy.passes,
            self.images, publish_additions=policy.additions is not None,
        )  # fmt: skip
        self.critic = TorchCritic(
            policy.load_critic(), adapter, settings, algorithm, config.critic.optimizer, policy.passes
        ) if config.critic else None  # fmt: skip
        self.rollout, self.reward = rollout, reward
        self.version = 0
        self.receipt: Receipt | None = None  # of the weights the engine serves

    def sync_weights(self) -> Receipt:
        """Make the engine serve the actor's weights, if it does not already; the receipt of the weights it serves."""
        if self.receipt is None or self.receipt.version != self.version:
            self.receipt = self.rollout.load_weights(self.actor.weights(), self.version)
        return self.receipt

    def update(self, batch: Batch) -> Metrics:
        """All optimizer steps of this batch: a new version of the weights."""
        result = self.critic.update(batch) if self.critic else {}
        result |= self.actor.update(batch)
        self.version += 1
        return result

    def save(self, folder: Path) -> None:
        self.actor.save(folder)
        if self.critic:
            self.critic.save(folder / "critic")

    def load(self, folder: Path) -> None:
        self.actor.load(folder)
        if self.critic:
            self.critic.load(folder / "critic")


def start_rollout(policy: Policy, model: torch.nn.Module) -> Rollout:
    """The engine that the run file or the backend chooses, started; weights reach it by `sync_weights`."""
    config, backend = policy.config, policy.backend
    name = backend.default_engine if config.rollout.engine == "auto" else config.rollout.engine
    sampling = [config.rollout] + ([config.evaluation] if config.evaluation else [])
    response = max(settings.max_new_tokens for settings in sampling)
    longest, context = config.data.max_prompt_tokens + response, context_length(policy.folder)
    if context is not None and longest > context:
        raise ConfigError(
            f"data.max_prompt_tokens: {config.data.max_prompt_tokens} and {response} new tokens are {longest}, more than the"
            f" {context} positions of {config.model.path}; lower it to {context - response} or less, or max_new_tokens"
        )
    build = registry.load("engines", name)
    return build(
        model=model, adapter=policy.adapter, folder=policy.folder, backend=backend, config=config.rollout,
        dtype=policy.settings.compute_dtype, max_tokens=longest, seed=config.seed, lora=policy.additions,
    )
