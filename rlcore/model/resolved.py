"""The model under training, resolved: folder, family, precision, device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlcore.config.schema import RunConfig
from rlcore.config.sections import LoraConfig, ModelConfig
from rlcore.device import Backend
from rlcore.distributed.ulysses import check_heads
from rlcore.errors import ConfigError, nearest
from rlcore.model import experts, lora
from rlcore.model.forward import ForwardSettings
from rlcore.model.loading import family_of, query_heads, resolve
from rlcore.model.routing import routers_of
from rlcore.model.vision import check_tower

MODEL_CACHE = Path.home() / ".cache" / "rlcore" / "models"
EMULATED = (
    "model.precision bf16: this {} has no bf16 instructions, and emulating them takes a hundred times as long as fp32;"
    " model.precision=auto takes the fast one"
)


class ResolvedModel:
    """The model under training and its forward settings; every role on this device is built from it."""

    def __init__(self, config: RunConfig, backend: Backend, device: torch.device | None = None) -> None:
        """`device`: instead of the backend's first. On torch's meta device neither weights nor that device are needed."""
        self.config, self.backend = config, backend
        self._weights = device is None or device.type != "meta"
        if self._weights:
            backend.prepare()
        self.folder = resolve(config.model, MODEL_CACHE, weights=self._weights)
        self.tower_folder = self._tower_folder()
        if heads := query_heads(self.folder):
            check_heads(heads, config.sharding.sequence_parallel)
        self.family = family_of(self.folder, config.model, config.vision)
        self.family.use_template(config.data.chat_template, config.data.chat_template_options)
        fast, asked = backend.default_precision(), config.model.precision
        self.precision = precision = fast if asked == "auto" else asked
        why = f"what this {backend.name} is fastest in" if asked == "auto" else "as model.precision says"
        self.notice = f"precision: {precision}, {why}"
        self.caution = EMULATED.format(backend.name) if precision == "bf16" != fast else None
        self.settings = ForwardSettings(
            device=device or backend.device(0),
            compute_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            max_tokens=config.train.max_tokens_per_microbatch,
            temperature=config.rollout.temperature,
            tile_bytes=backend.tile_bytes,
        )

    def load(self, folder: Path) -> torch.nn.Module:
        """Load the model with the weights of `folder`, in float32 on the device."""
        return self.family.load(folder, torch.float32).to(self.settings.device)

    def prepared(self, model: torch.nn.Module) -> torch.nn.Module:
        """Have the model use what this device is fastest with: fused layers, grouped products of experts."""
        experts.choose(model, self.config.model.groupgemm, self.settings.device, self.settings.compute_dtype)
        return self.backend.fuse(model)

    def critic_folder(self) -> Path:
        """Folder of the model that the critic starts from."""
        settings = self.config.critic
        assert settings is not None
        if settings.path is None:
            return self.folder
        return resolve(ModelConfig(path=settings.path), MODEL_CACHE, "critic", self._weights)

    def trainable(self, model: torch.nn.Module) -> torch.nn.Module:
        """Apply the run file's training settings to `model`: frozen parts, LoRA, gradient checkpointing."""
        config = self.config.model
        if config.routing_replay and not routers_of(model):
            raise ConfigError(f"model.routing_replay: {config.path} has no experts; remove it")
        tower = self.family.vision_tower(model)
        for part in config.freeze:
            self._freeze(model, part, tower)
        if config.lora:
            model = lora.attach(model, config.lora, self.family.head(model), _frozen(model), self._in_fused(model))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(f"model.freeze: {', '.join(config.freeze)} is every weight: nothing is left to train; name fewer")
        if self.config.train.gradient_checkpointing:
            _checkpoint_layers(model)
        return model

    def encoder_tower(self, model: torch.nn.Module) -> torch.nn.Module | None:
        """The vision tower of `model` if it is frozen, so that one encoder embeds the images for all roles; else None."""
        return self.family.vision_tower(model) if self.config.model.images_are_read_once else None

    @property
    def engine_lora(self) -> LoraConfig | None:
        """LoRA settings if only LoRA weights are sent to the engine, else None."""
        settings = self.config.model.lora
        return settings if settings and settings.sync == "adapter" else None

    def _tower_folder(self) -> Path | None:
        """Folder of the model whose vision tower replaces the policy's own, if set."""
        if self.config.vision.path is None:
            return None
        folder = resolve(ModelConfig(path=self.config.vision.path), MODEL_CACHE, "vision", self._weights)
        check_tower(self.folder, folder)
        return folder

    def _in_fused(self, model: torch.nn.Module) -> set[str]:
        """Layers of files whose weights the model holds fused with others': of each expert its projections."""
        found = (self.family.published(name, weight.shape) for name, weight in model.named_parameters())
        return {part.removesuffix(".weight") for parts in found if len(parts) > 1 for part in parts}

    def _freeze(self, model: torch.nn.Module, part: str, tower: torch.nn.Module | None) -> None:
        """Freeze the weights under `part`; ConfigError when the model has none."""
        if part == "vision" and tower is not None:
            tower.requires_grad_(False)
            return
        names = {self.family.hf_name(name): parameter for name, parameter in model.named_parameters()}
        chosen = [parameter for name, parameter in names.items() if name == part or name.startswith(f"{part}.")]
        if not chosen:
            parts = sorted({name.split(".")[0] for name in names} | {".".join(name.split(".")[:2]) for name in names})
            raise ConfigError(f"model.freeze: no weight of {self.config.model.path} starts with {part!r}{nearest(part, parts)}")
        for parameter in chosen:
            parameter.requires_grad_(False)


def _frozen(model: torch.nn.Module) -> set[str]:
    """Names of the layers whose weights are all frozen."""
    return {
        name for name, layer in model.named_modules()
        if (weights := list(layer.parameters(recurse=False))) and not any(weight.requires_grad for weight in weights)
    }  # fmt: skip


def _checkpoint_layers(model: Any) -> None:
    """Enable gradient checkpointing. Only the checkpointed layers themselves are set to training: dropout below stays off."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # after the backend has made it importable

    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
