"""The vision encoder: a role beside the actor that embeds each image of a step once, for all roles after it.

Its tower is frozen, so embeddings made at the start of a step are valid until its end. MindSpeed-RL calls the reuse
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
    """A frozen vision tower, shared with the actor's model where both are in one process."""

    def __init__(self, tower: nn.Module, family: VisionModelFamily, settings: ForwardSettings, images_per_batch: int) -> None:
        self.tower, self.family, self.settings, self.images_per_batch = tower, family, settings, images_per_batch
        hold_frozen(tower, settings.compute_dtype)

    def embed(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Replace pixel_values by `image_embeds` [tokens, D] in host memory; prompts stay in order."""
        read = self.read([prompt.vision for prompt in prompts])
        return [
            prompt if vision is None else replace(prompt, vision=vision) for prompt, vision in zip(prompts, read, strict=True)
        ]

    @torch.no_grad()
    def read(self, visions: Sequence[Vision | None]) -> list[Vision | None]:
        """`embed` for the prompts' `vision` fields alone."""
        images = self._images_of(visions)
        return [None if vision is None else _embedded(vision, images) for vision in visions]

    def _images_of(self, visions: Iterable[Vision | None]) -> Iterator[Tensor]:
        """Yield [tokens, D] of every image in order; the tower runs on `images_per_batch` of them at a time."""
        images = (image for vision in visions if vision is not None for image in _images(vision))
        while batch := list(islice(images, self.images_per_batch)):
            pixels, grids = zip(*batch, strict=True)
            vision = {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.stack(grids)}
            embedded = self.family.embed_images(self.tower, vision)
            self.settings.beat()
            yield from embedded


def check_tower(policy_folder: Path, folder: Path) -> None:
    """Check that the tower in `folder` can replace that in `policy_folder`. ConfigError for another family, or a configuration
    that differs in something that weight shapes may not show, such as heads."""
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
    """Copy the vision tower's weights from `folder`, which may hold only these, into `model`, whose tower is whole on every
    rank. ConfigError, naming the run file's `section`, for a weight that is missing there or has another shape."""
    tower = family.vision_tower(model)
    assert tower is not None, "`check_tower` comes first"
    places = _named(model, tower, family)
    with torch.no_grad():
        for name, tensor in _stored(folder, {name: place.shape for name, place in places.items()}, family, section):
            places[name].copy_(tensor)


def lone_tower(family: ModelFamily, policy_folder: Path, folder: Path | None, device: torch.device) -> nn.Module:
    """Load only the vision tower of the model in `policy_folder`, with the weights of `folder` if given."""
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
    """Take the prompt's images from the iterator, copied to memory of their own: prompts are sent between processes."""
    grids = vision["image_grid_thw"]
    return {"image_embeds": torch.cat(list(islice(images, len(grids)))).cpu(), "image_grid_thw": grids}


def _named(model: nn.Module, tower: nn.Module, family: ModelFamily) -> dict[str, nn.Parameter]:
    """The tower's weights by Hugging Face name."""
    inside = {id(parameter) for parameter in tower.parameters()}
    return {family.hf_name(name): value for name, value in model.named_parameters() if id(value) in inside}


def _stored(
    folder: Path, shapes: Mapping[str, torch.Size], family: ModelFamily, section: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors named in `shapes`, one at a time. ConfigError names one that is missing or has another shape."""
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
