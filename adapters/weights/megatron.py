"""Megatron-Core checkpoints in its `torch_dist` format: whole tensors in a distributed checkpoint, for any parallel sizes.

    release/{.metadata,*.distcp,common.pt,metadata.json}      latest_checkpointed_iteration.txt holds "release"

Layers are stacked: `decoder.layers.mlp.linear_fc2.weight` is [layers, out, in], and of experts [layers, experts, out, in]. The
names are those of Transformer Engine's layers, which Megatron-Core's own layers save under too, but for one norm of mixtures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

from pydantic import PositiveInt
from torch import Tensor

from rlcore.errors import ConfigError
from rlcore.weights import distributed
from rlcore.weights.architecture import Architecture, architecture
from rlcore.weights.format import Content, Word, content_of, required
from rlcore.weights.output import Draft
from rlcore.weights.pickles import save
from rlcore.weights.tensors import Spec, Weights, selected

from .tables import Rule, applied, by_hub, cut_rows, decoder_rules, joined_tensor, tower_rules

TRACKER = "latest_checkpointed_iteration.txt"
_NORMS = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
_MIXTURE_NORMS = (_NORMS[0], "pre_mlp_layernorm.weight")  # of Megatron-Core's own layers: _NORMS; both are written
_TOWER = {
    "patches": "vision_model.patch_embed.proj.weight", "norm": "vision_model.decoder.final_layernorm.weight",
    "projection": "vision_model.projection.encoder.",
}  # fmt: skip
_OTHER_STATES = ("optimizer.", "chained_", "rng_state", "rerun_state")
_STATEFUL = re.compile(r"(linear_(qkv|proj|fc1|fc2))\.weight$")  # modules that save an `_extra_state`, here empty
_CLASSES = ("megatron.",)  # of other versions' metadata


class Megatron:
    """Qwen2.5-VL, Qwen3 (dense and mixtures of experts), Qwen2 and Llama."""

    words: ClassVar[Mapping[str, Word]] = {}

    def read(self, source: Path, base: Path | None) -> Content:
        """A folder with the tracker file, or one iteration's."""
        base = required(base, source)
        return content_of(_opened(_iteration(source), architecture(base)), base, source)

    def write(
        self, content: Content, draft: Draft, *, tensor_parallel: PositiveInt = 1, pipeline_parallel: PositiveInt = 1,
        expert_parallel: PositiveInt = 1, first_stage_layers: PositiveInt | None = None,
        last_stage_layers: PositiveInt | None = None,
    ) -> Weights:  # fmt: skip
        """Chunks as ranks of these sizes read them, a file for each pipeline stage. Any other sizes can load them too.

        ConfigError for sizes that do not divide the model's heads, layers or experts.
        """
        draft.require(content.weights.nbytes)
        config = content.model.text_config
        _check_sizes(content.model, tensor_parallel, expert_parallel)
        stages = _stages(config.num_hidden_layers, pipeline_parallel, first_stage_layers, last_stage_layers)
        folder = draft.folder / "release"
        folder.mkdir()
        writer = distributed.Writer(folder)
        rules = applied(_rules(content.model), content.weights.specs, "to megatron")
        stacks = _stacks(rules)
        for rule in rules:
            stack, whole = stacks[rule.other], joined_tensor(rule, content.weights)
            _write(writer, stack, whole, rule, tensor_parallel, stages)
            if (alias := stack.name.replace(_MIXTURE_NORMS[1], _NORMS[1])) != stack.name:
                _write(writer, replace(stack, name=alias), whole, rule, tensor_parallel, stages)
        writer.close()
        with (folder / "common.pt").open("wb") as common:
            save({"checkpoint_version": 3.0, "iteration": 0}, common)
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
        (folder / "metadata.json").write_text(json.dumps({**backends, "common_backend_version": 1}), encoding="utf-8")
        (draft.folder / TRACKER).write_text("release", encoding="utf-8")
        return _opened(folder, content.model)


def _rules(model: Architecture) -> list[Rule]:
    vision = getattr(model.config, "vision_config", None)
    norms = _MIXTURE_NORMS if getattr(model.text_config, "num_experts", 0) else _NORMS
    rules = decoder_rules(model.text_config, norms, "language_model." if vision else "")
    return rules + (tower_rules(vision, "vision_model.decoder.layers.{i}.", _NORMS, _TOWER) if vision else [])


@dataclass(frozen=True)
class _Stack:
    """Where one layer's (and expert's) tensor is in a stacked one."""

    name: str
    first: tuple[int, ...]  # layer, expert
    sizes: tuple[int, ...]  # layers, experts


def _stack_name(name: str) -> tuple[str, tuple[int, ...]]:
    """The stacked tensor, and where in it this one is: `decoder.layers.3.mlp.linear_fc2.weight` is at [3]."""
    first: list[int] = []
    for pattern, title in ((r"\.layers\.(\d+)\.", ".layers."), (r"\.experts\.(\d+)\.", ".experts.experts.")):
        if match := re.search(pattern, name):
            first.append(int(match[1]))
            name = name.replace(match[0], title, 1)
    return name, tuple(first)


def _stacks(rules: Sequence[Rule]) -> dict[str, _Stack]:
    places = {rule.other: _stack_name(rule.other) for rule in rules}
    sizes: dict[str, tuple[int, ...]] = {}
    for name, first in places.values():
        sizes[name] = tuple(max(pair) for pair in zip(sizes.get(name, first), first, strict=True))
    return {other: _Stack(name, first, tuple(size + 1 for size in sizes[name])) for other, (name, first) in places.items()}


def _write(
    writer: distributed.Writer, stack: _Stack, whole: Tensor, rule: Rule, ranks: int, stages: Sequence[int]
) -> None:
    """Write the tensor in the runs that its ranks read, and the empty state of the module it belongs to."""
    file = f"__{_stage(rule.other, stages)}_0.distcp"
    axis, depth = rule.layout.dimension, len(stack.first)
    pieces = rule.layout.pieces(whole, ranks) if axis is None or whole.shape[axis] % ranks == 0 else [whole]
    start = [*stack.first, *(0 for _ in whole.shape)]
    for piece in pieces:
        shape = (*stack.sizes, *whole.shape)
        writer.add(file, stack.name, shape, start, piece.reshape(*(1 for _ in stack.first), *piece.shape))
        if axis is not None:
            start[depth + axis] += piece.shape[axis]
    if _STATEFUL.search(stack.name):
        place = "_".join(".".join(map(str, numbers or (one,))) for numbers, one in ((stack.first, 0), (stack.sizes, 1)))
        writer.add_object(file, f"{stack.name.removesuffix('weight')}_extra_state/shard_{place}", [None])


def _stage(name: str, stages: Sequence[int]) -> int:
    """The pipeline stage that holds a tensor; `stages` are the first layers after each."""
    if match := re.search(r"(?<!vision_model\.)decoder\.layers\.(\d+)\.", name):
        return next(stage for stage, end in enumerate(stages) if int(match[1]) < end)
    last = name.endswith(("output_layer.weight", "decoder.final_layernorm.weight")) and not name.startswith("vision_model.")
    return len(stages) - 1 if last else 0


def _stages(layers: int, count: int, first: int | None, last: int | None) -> list[int]:
    """Ends of the stages: even, but for the sizes that are given."""
    given = [size for size in (first, last) if size is not None]
    rest, left = layers - sum(given), count - len(given)
    if rest < 0 or left < 0 or (left == 0) != (rest == 0) or (left and rest % left):
        raise ConfigError(
            f"to.pipeline_parallel: {layers} layers do not make {count} stages{f' with {given} in the ends' if given else ''};"
            " choose a divisor, or set to.first_stage_layers and to.last_stage_layers"
        )
    middle = [rest // left] * left if left else []
    return list(accumulate([*([first] if first is not None else []), *middle, *([last] if last is not None else [])]))


def _check_sizes(model: Architecture, tensor: int, expert: int) -> None:
    config, vision = model.text_config, getattr(model.config, "vision_config", None)
    counts = {
        "query groups": config.num_key_value_heads, "intermediate size": config.intermediate_size,
        "experts' intermediate size": getattr(config, "moe_intermediate_size", 0),
        "vision heads": getattr(vision, "num_heads", 0), "vision intermediate size": getattr(vision, "intermediate_size", 0),
    }  # fmt: skip
    for what, count in counts.items():
        if count % tensor:
            raise ConfigError(f"to.tensor_parallel: {tensor} does not divide the model's {what}, {count}; choose a divisor")
    experts = getattr(config, "num_experts", 0) or 0
    if expert > 1 and (not experts or experts % expert):
        raise ConfigError(f"to.expert_parallel: {expert} does not divide the model's {experts} experts; choose a divisor")


def _iteration(source: Path) -> Path:
    """The folder of the newest iteration; ConfigError for another format than torch_dist."""
    tracker = source / TRACKER
    folder = source
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8").strip()
        folder = source / (f"iter_{int(text):07d}" if text.isdigit() else text)
    try:
        backend = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'metadata.json'}: not a distributed checkpoint of Megatron-Core: {error}") from None
    if backend != "torch_dist":
        raise ConfigError(f"{folder / 'metadata.json'}: format {backend!r}; save it as torch_dist")
    return folder


def _opened(folder: Path, model: Architecture) -> Weights:
    """The weights under the hub's names."""
    stacked, chunks = distributed.open_folder(folder, _CLASSES)
    rules = applied(_rules(model), model.expected, str(folder))
    layered = _one_norm(_layered(folder, stacked, chunks), {rule.other for rule in rules})
    layered = cut_rows(layered, _vocabulary(rules, model))
    return by_hub(rules, layered, model, str(folder))


def _layered(folder: Path, stacked: Weights, chunks: Mapping[str, Any]) -> Weights:
    """Every layer's and expert's own tensor of stacked ones; other states of a training run are left out."""
    specs, places = dict[str, Spec](), dict[str, tuple[str, tuple[int, ...]]]()
    for name, spec in stacked.specs.items():
        if not name.startswith(_OTHER_STATES):
            for single, first in _singles(name, spec.shape):
                specs[single] = Spec(spec.shape[len(first) :], spec.dtype)
                places[single] = name, first

    def read(single: str) -> Tensor:
        name, first = places[single]
        return distributed.part(folder, stacked.specs[name], chunks[name], first, name)

    return Weights(specs, read)


def _one_norm(weights: Weights, known: Collection[str]) -> Weights:
    """Without the second name of a mixture's norm, where both are there; under its first, where only that is."""
    names = dict[str, str]()
    for name in weights.specs:
        first = name.replace(_NORMS[1], _MIXTURE_NORMS[1])
        if name not in known and first in known:
            names.setdefault(first, name)
        else:
            names[name] = name
    return selected(weights, names)


def _singles(name: str, shape: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names of the tensors that are stacked under this one, and their leading indices."""
    axes = [(r"\.layers\.(?!\d)", ".layers.{}."), (r"\.experts\.experts\.(?!\d)", ".experts.{}.")]
    titles: list[tuple[str, tuple[int, ...]]] = [(name, ())]
    for pattern, title in axes:
        if re.search(pattern, name):
            size = shape[len(titles[0][1])]
            titles = [
                (re.sub(pattern, title.format(number), one, count=1), (*first, number))
                for one, first in titles for number in range(size)
            ]  # fmt: skip
    yield from titles


def _vocabulary(rules: Sequence[Rule], model: Architecture) -> dict[str, int]:
    """Rows of the embedding and the head without what pads them for tensor parallelism."""
    padded = [rule for rule in rules if rule.other.endswith(("word_embeddings.weight", "output_layer.weight"))]
    return {rule.other: model.expected[rule.hub[0]][0] for rule in padded}
