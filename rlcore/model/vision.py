"""The vision encoder: a role beside the actor that reads each image of a step once, for everybody who comes after it.

Its tower does not learn, so what it gives at the start of a step still holds at the end. MindSpeed-RL calls the reuse
`reuse_image_embeds`, and the encoder with weights and a batch size of its own `colocate_actor_and_vit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rlcore.errors import ConfigError
from rlcore.model.forward import ForwardSettings
from rlcore.model.loading import model_type
from rlcore.model.precision import hold_frozen
from rlcore.protocols import ModelFamily, VisionModelFamily
from rlcore.types import Prompt, Vision

_OF_TRAINING = ("dtype", "initializer_range")  # entries of a tower's configuration that its forward pass does not read


class VisionEncoder:
    """A vision tower that does not learn, shared with the actor's model where both are in one process."""

    def __init__(self, tower: nn.Module, family: VisionModelFamily, settings: ForwardSettings, images_per_batch: int) -> None:
        self.tower, self.family, self.settings, self.images_per_batch = tower, family, settings, images_per_batch
        hold_frozen(tower, settings.compute_dtype)

    def embed(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts in order, with `image_embeds` [tokens, D], in host memory, in place of pixel_values."""
        read = self.read([prompt.vision for prompt in prompts])
        return [
            prompt if vision is None else replace(prompt, vision=vision) for prompt, vision in zip(prompts, read, strict=True)
        ]

    @torch.no_grad()
    def read(self, visions: Sequence[Vision | None]) -> list[Vision | None]:
        """The same for the images of each prompt alone."""
        images = self._images_of(visions)
        return [None if vision is None else _embedded(vision, images) for vision in visions]

    def _images_of(self, visions: Iterable[Vision | None]) -> Iterator[Tensor]:
        """[tokens, D] of every image in order; the tower sees `images_per_batch` of them at a time."""
        images = (image for vision in visions if vision is not None for image in _images(vision))
        while batch := list(islice(images, self.images_per_batch)):
            pixels, grids = zip(*batch, strict=True)
            vision = {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.stack(grids)}
            embedded = self.family.embed_images(self.tower, vision)
            self.settings.beat()
            yield from embedded


def check_tower(policy_folder: Path, folder: Path) -> None:
    """ConfigError when the tower of the model in `folder` cannot take the place of that in `policy_folder`: another family, or
    built otherwise in something that the shapes of its weights may not show, such as heads."""
    from transformers import AutoConfig

    families = [model_type(policy_folder), model_type(folder, "vision")]
    if families[0] != families[1]:
        raise ConfigError(
            f"vision.path: {folder} is of the family {families[1]!r}, the policy of {families[0]!r}; give one of the policy's"
        )
    ours, theirs = (getattr(AutoConfig.from_pretrained(place), "vision_config", None) for place in (policy_folder, folder))
    if ours is None or theirs is None:
        raise ConfigError(f"vision.path: models of the family {families[0]!r} read text only; remove vision.path")
    for name, value in ours.to_dict().items():
        if name not in _OF_TRAINING and theirs.to_dict().get(name) != value:
            raise ConfigError(
                f"vision.path: the vision tower in {folder} has {name} {theirs.to_dict().get(name)}, the policy's has {value};"
                " give one that is built like the policy's"
            )


def replace_tower(model: nn.Module, family: ModelFamily, folder: Path, section: str = "vision") -> None:
    """Copies the vision tower's weights in `folder`, which need hold no others, into `model`, where no rank has less than all
    of them. ConfigError, in the name of the run file's `section`, names one that is missing there or has another shape."""
    tower = family.vision_tower(model)
    assert tower is not None, "`check_tower` comes first"
    places = _named(model, tower, family)
    with torch.no_grad():
        for name, tensor in _stored(folder, {name: place.shape for name, place in places.items()}, family, section):
            places[name].copy_(tensor)


def lone_tower(family: ModelFamily, policy_folder: Path, folder: Path | None, device: torch.device) -> nn.Module:
    """The vision tower of the model in `policy_folder` without the model, its weights from `folder` if there is one."""
    model = family.meta_model(policy_folder, torch.float32)
    tower = family.vision_tower(model)
    if tower is None:
        raise ConfigError(f"model.freeze: {policy_folder} has no vision tower; remove vision")
    tower.requires_grad_(False)._apply(lambda one: torch.empty_like(one, device=device) if one.is_meta else one.to(device))
    replace_tower(model, family, folder or policy_folder, "vision" if folder else "model")
    return tower


def _images(vision: Vision) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels [patches, C] and grid [3] of each image."""
    grids = vision["image_grid_thw"]
    return zip(vision["pixel_values"].split(grids.prod(-1).tolist()), grids, strict=True)


def _embedded(vision: Vision, images: Iterator[Tensor]) -> Vision:
    """As many of the next images as the prompt has, in memory of their own: prompts travel."""
    grids = vision["image_grid_thw"]
    return {"image_embeds": torch.cat(list(islice(images, len(grids)))).cpu(), "image_grid_thw": grids}


def _named(model: nn.Module, tower: nn.Module, family: ModelFamily) -> dict[str, nn.Parameter]:
    """The tower's weights under their published names."""
    inside = {id(parameter) for parameter in tower.parameters()}
    return {family.hf_name(name): value for name, value in model.named_parameters() if id(value) in inside}


def _stored(
    folder: Path, shapes: Mapping[str, torch.Size], family: ModelFamily, section: str
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of these names, one at a time. ConfigError names one that the folder lacks, or holds in another shape."""
    missing = set(shapes)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():
                if (name := family.hf_name(stored)) in missing:
                    missing.remove(name)
                    _check_shape(file.get_slice(stored).get_shape(), shapes[name], f"{section}.path: {name} in {folder}")
                    yield name, file.get_tensor(stored)
    if missing:
        raise ConfigError(
            f"{section}.path: the weights in {folder} lack {len(missing)} of {len(shapes)} tensors of the vision tower"
            f" ({min(missing)} first); is the folder complete?"
        )


def _check_shape(shape: Sequence[int], wanted: torch.Size, what: str) -> None:
    if list(shape) != list(wanted):
        raise ConfigError(f"{what} is {list(shape)}, the policy's is {list(wanted)}; give one that is built like the policy's")
