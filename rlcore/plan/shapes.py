"""What a memory plan needs to know of a run's models: shapes of their weights, and bytes of their passes. Reads no weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from rlcore.config.schema import RunConfig
from rlcore.device import Backend
from rlcore.model.critic import ValueForward
from rlcore.model.forward import Forward
from rlcore.model.packing import plan_microbatches
from rlcore.model.resolved import ResolvedModel
from rlcore.plan import footprint
from rlcore.plan.footprint import META, model_of_shapes, packed_row
from rlcore.plan.memory import Command, Geometry, Passes, Row, Weight
from rlcore.protocols import ModelFamily, VisionModelFamily
from rlcore.types import Prompt, Vision


@dataclass(frozen=True)
class Images:
    """The images of the prompt with most of them, in patches, among some of a run's."""

    largest: Vision
    count: int  # of that prompt


def images_of(prompts: Sequence[Prompt]) -> Images | None:
    """None where no prompt has any."""
    found = [prompt.vision for prompt in prompts if prompt.vision is not None]
    if not found:
        return None
    largest = max(found, key=lambda vision: int(vision["image_grid_thw"].prod(-1).sum()))
    return Images(largest, len(largest["image_grid_thw"]))


def command_of(config: RunConfig) -> Command:
    """The command that a run file is for."""
    return "grpo" if config.reward else "dpo" if config.dpo else "sft"


def longest_row(config: RunConfig, command: Command) -> Row:
    """The longest packed row: full to the cap, if a rank's share of an optimizer step has as many tokens."""
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    cap = config.train.max_tokens_per_microbatch
    ranks = config.topology.of("actor").devices // config.sharding.sequence_parallel
    if command == "grpo":
        count, group = config.train.prompts_per_step // config.train.minibatches_per_step, config.algorithm.group_size
    elif command == "dpo":
        count, group = (config.dpo.pairs_per_step if config.dpo else 1), 2
    else:
        count, group = (config.sft.rows_per_step if config.sft else 1), 1
    share = -(-count // ranks)
    rows = len(plan_microbatches([(prompt, [response] * group)] * share, cap))
    whole = prompt + group * (response - 1)
    tokens = min(cap, share * whole)
    slices = config.sharding.sequence_parallel
    return Row(-(-tokens // slices), -(-(tokens * group * response // whole) // slices), max(1, tokens // whole), rows)


class Shapes:
    """Geometries of run files that differ in settings. What was counted is kept, since plans are compared."""

    def __init__(self, backend: Backend, images: Images | None) -> None:
        self.backend, self.images = backend, images
        self._kept: dict[tuple[object, ...], Any] = {}

    def of(self, config: RunConfig, command: Command, both: bool) -> Geometry:
        """With `both`, an update is counted with and without gradient checkpointing."""
        resolved, row = ResolvedModel(config, self.backend, META), longest_row(config, command)
        learned = config.critic if command == "grpo" else None
        checkpointing, whole = config.train.gradient_checkpointing, config.topology.of("actor").devices == 1
        model = (config.model.model_dump_json(), config.vision.path)
        shape = (*model, row.tokens, row.targets)
        again = row.count > 1
        passes = Passes(
            update=self._once(self._update, resolved, row, checkpointing, key=(*shape, whole, again)),
            update_otherwise=both and self._once(self._update, resolved, row, not checkpointing, key=(*shape, whole, again)),
            score=self._once(self._score, resolved, row, key=shape),
            critic=self._once(self._value_update, resolved, row, key=(*shape, whole, again)) if learned else 0,
            **self._once(self._image_passes, resolved, row, checkpointing, key=(*model, config.vision, row.prompts)),
        )  # fmt: skip
        sizes = self._once(_sizes, resolved, key=model)
        critic = self._once(self._of_critic, resolved, key=model) if learned else ()
        return Geometry(critic=critic, row=row, passes=passes, **sizes)

    def _once(self, count: Callable[..., Any], resolved: ResolvedModel, *more: object, key: tuple[object, ...]) -> Any:
        named = (count.__name__, *(one for one in more if isinstance(one, bool)), str(key))
        if named not in self._kept:
            self._kept[named] = count(resolved, *more)
        return self._kept[named]

    def _update(self, resolved: ResolvedModel, row: Row, checkpointing: bool) -> int:
        train = resolved.config.train.model_copy(update={"gradient_checkpointing": checkpointing})
        config = resolved.config.model_copy(update={"train": train})
        forward = self._forward(ResolvedModel(config, self.backend, META), trained=True)
        packed = packed_row(row.tokens, row.targets)
        return self._trained(forward, resolved, row, lambda: forward(packed)[0].sum())

    def _score(self, resolved: ResolvedModel, row: Row) -> int:
        forward = self._forward(resolved, trained=False)
        packed = packed_row(row.tokens, row.targets)
        return footprint.forward_bytes(forward, resolved.settings.compute_dtype, lambda: forward(packed, entropy=False))

    def _forward(self, resolved: ResolvedModel, trained: bool) -> Forward:
        """A forward pass on shapes, built once: its weights' dtypes are as the last count left them."""
        config = resolved.config
        whole = config.topology.of("actor").devices == 1
        key = ("forward", trained, whole, trained and config.train.gradient_checkpointing, config.model.model_dump_json())
        if key not in self._kept:
            model = model_of_shapes(resolved, resolved.folder, trained)
            self._kept[key] = Forward(model, resolved.family, resolved.settings)
        return self._kept[key]

    def _value_update(self, resolved: ResolvedModel, row: Row) -> int:
        critic, packed = self._critic(resolved), packed_row(row.tokens, row.targets)
        return self._trained(critic, resolved, row, lambda: critic(packed).sum())

    def _trained(self, forward: nn.Module, resolved: ResolvedModel, row: Row, loss: Callable[[], Tensor]) -> int:
        whole = resolved.config.topology.of("actor").devices == 1
        return footprint.training_bytes(forward, resolved.settings.compute_dtype, loss, whole, again=row.count > 1)

    def _of_critic(self, resolved: ResolvedModel) -> list[Weight]:
        """The critic's weights. Its vocabulary head is not used, so that only one tied to the embedding learns."""
        critic = self._critic(resolved)
        head, embedding = resolved.family.head(critic.backbone), cast(Any, critic.backbone).get_input_embeddings().weight
        unused = set() if head is embedding else {id(head)}
        return weights_of(critic, resolved.family, critic.backbone, unused)

    def _critic(self, resolved: ResolvedModel) -> ValueForward:
        backbone = model_of_shapes(resolved, resolved.critic_folder(), trained=False).requires_grad_(True)
        if (tower := resolved.encoder_tower(backbone)) is not None:
            tower.requires_grad_(False)
        return ValueForward(backbone, resolved.family, resolved.settings)

    def _image_passes(self, resolved: ResolvedModel, row: Row, checkpointing: bool) -> dict[str, int]:
        """The tower's `Passes`."""
        if self.images is None:
            return {}
        once, settings = resolved.config.model.images_are_read_once, resolved.settings
        tower = resolved.family.vision_tower(model_of_shapes(resolved, resolved.folder, trained=True))
        assert tower is not None, "prompts have images where there is a tower"
        family = cast(VisionModelFamily, resolved.family)
        peak, size = footprint.image_bytes(family, tower, settings.compute_dtype, self.images.largest, trained=not once)
        if once:
            return {"tower": peak * resolved.config.vision.images_per_batch // self.images.count, "image_embeds": size}
        return {"tower_update": peak * row.prompts, "image_embeds": size}


def _sizes(resolved: ResolvedModel) -> dict[str, Any]:
    """The policy's part of a `Geometry`."""
    policy, base = (model_of_shapes(resolved, resolved.folder, trained) for trained in (True, False))
    tower, text = resolved.family.vision_tower(base), cast(Any, base).config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return {
        "policy": weights_of(policy, resolved.family, policy),
        "reference": sum(weight.numel() for weight in base.parameters()),
        "tower": sum(weight.numel() for weight in tower.parameters()) if tower is not None else 0,
        "layers": text.num_hidden_layers, "cache_width": 2 * text.num_hidden_layers * heads * width,
        "vocabulary": len(resolved.family.head(base)), "largest": max(weight.numel() for weight in base.parameters()),
    }  # fmt: skip


def weights_of(
    module: nn.Module, family: ModelFamily, model: nn.Module, unused: Collection[int] = ()
) -> list[Weight]:
    """Parameters of `module`, which holds the family's `model`; `unused`: ids of those that no loss depends on."""
    tower = family.vision_tower(model)
    places = {id(weight): "tower" for weight in tower.parameters()} if tower is not None else {}
    for number, block in enumerate(family.blocks(model)):
        places |= {id(weight): str(number) for weight in block.parameters()}
    return [
        Weight(
            len(weight), weight.numel(), weight.requires_grad, places.get(id(weight), "root"), id(weight) in unused,
            lora=".lora_" in name,
        )
        for name, weight in module.named_parameters()
    ]  # fmt: skip
