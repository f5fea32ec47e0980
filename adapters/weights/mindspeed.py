"""MindSpeed-MM's checkpoints of Qwen2.5-VL: a file of `torch.save` for each rank of tensor and pipeline parallelism.

    release/mp_rank_{TP:02}[_{PP:03}]/model_optim_rng.pt        latest_checkpointed_iteration.txt holds "release"

Layers are numbered from 0 in each pipeline stage; a stage has its own number of vision and of language layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from rlcore.errors import ConfigError
from rlcore.weights.architecture import Architecture, architecture
from rlcore.weights.format import Content, Word, content_of, required
from rlcore.weights.output import Draft
from rlcore.weights.pickles import Stored, read_stored, stored
from rlcore.weights.tensors import Spec, Weights, few, spec_of

from .tables import ROWS, Rule, applied, by_hub, decoder_rules, joined_tensor, tower_rules

TRACKER, FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
Layers = list[NonNegativeInt] | list[list[NonNegativeInt]]  # of each pipeline stage; nested as MindSpeed-MM writes it
_NORMS = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
_VISION, _TEXT = "image_encoder.encoder.blocks.layers.", "text_decoder.decoder.layers."
_PROJECTOR = "image_encoder.projector."
_OUTSIDE = {
    "patches": "image_encoder.encoder.patch_embed.proj.weight", "norm": f"{_PROJECTOR}layernorm.weight",
    "projection": f"{_PROJECTOR}encoder.",
}  # fmt: skip
_LAST = (_PROJECTOR, "text_decoder.decoder.final_layernorm.", "text_decoder.output_layer.")
_HEAD = "text_decoder.output_layer.weight"
_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_CLASSES = ("megatron.", "mindspeed", "argparse.Namespace")  # of the arguments that a run saves beside its weights


class MindSpeed:
    """Whole models, and vision towers alone, which can be written but are no model to read."""

    words: ClassVar[Mapping[str, Word]] = {}

    def read(self, source: Path, base: Path | None) -> Content:
        """The newest iteration. Parallel sizes are those of the files."""
        base = required(base, source)
        return content_of(_opened(_iteration(source), architecture(base)), base, source)

    def write(
        self, content: Content, draft: Draft, *, vit_pp_layers: Layers, llm_pp_layers: Layers | None = None,
        tp_size: PositiveInt = 1, vit_only: bool = False,
    ) -> Weights:  # fmt: skip
        """One rank's file is in memory at a time. `vit_only` writes what `vit_config.load` wants: the tower and its projector.

        ConfigError for sizes that do not fit the model.
        """
        model, table = content.model, _rules(content.model)
        plan = _plan(model, vit_pp_layers, llm_pp_layers, vit_only, tp_size)
        names = [name for name in content.weights.specs if not vit_only or name.startswith("visual.")]
        rules = applied(table, names, "to mindspeed")
        if plan.stages > 1 and not vit_only and _HEAD not in {rule.other for rule in rules}:
            rules.append(Rule(("model.embed_tokens.weight",), _HEAD, ROWS))  # the last stage cannot reach the embedding
        draft.require(sum(content.weights.specs[name].nbytes for name in names))
        for stage in range(plan.stages):
            here = [(rule, plan.local(rule.other)) for rule in rules if plan.stage(rule.other) == stage]
            for rank in range(tp_size):
                shares = {name: _share(joined_tensor(rule, content.weights), rule, rank, tp_size) for rule, name in here}
                path = draft.folder / "release" / _rank_folder(rank, stage, plan.stages) / FILE
                path.parent.mkdir(parents=True)
                torch.save({"model": shares, "checkpoint_version": 3.0}, path)
        (draft.folder / TRACKER).write_text("release", encoding="utf-8")
        written = _opened(draft.folder / "release", model)
        return Weights({name: written.specs[name] for name in names}, written.read)


def _rules(model: Architecture) -> list[Rule]:
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        raise ConfigError(f"{model.folder}: MindSpeed-MM holds vision-language models; this is a {model.config.model_type}")
    text = decoder_rules(model.text_config, _NORMS, "text_decoder.")
    return text + tower_rules(vision, f"{_VISION}{{i}}.", _NORMS, _OUTSIDE)


def _share(whole: Tensor, rule: Rule, rank: int, ranks: int) -> Tensor:
    return rule.layout.shares(whole, ranks)[rank].clone()  # without what else is in the storage


@dataclass(frozen=True)
class _Plan:
    """Layers of each stage, by the prefix of their names."""

    layers: Mapping[str, Sequence[int]]

    @property
    def stages(self) -> int:
        return len(next(iter(self.layers.values())))

    def stage(self, name: str) -> int:
        """The first and the last stage with layers of a kind hold what is before and after them."""
        prefix, number = _layer(name)
        sizes = self.layers[prefix]
        if number is not None:
            return next(stage for stage, end in enumerate(accumulate(sizes)) if number < end)
        used = [stage for stage, size in enumerate(sizes) if size]
        return used[-1 if name.startswith(_LAST) else 0]

    def local(self, name: str) -> str:
        prefix, number = _layer(name)
        return name if number is None else _renumbered(name, number - sum(self.layers[prefix][: self.stage(name)]))


def _layer(name: str) -> tuple[str, int | None]:
    """The prefix of its kind's layers, and its layer."""
    prefix = _TEXT if name.startswith("text_decoder.") else _VISION
    return prefix, int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None


def _renumbered(name: str, number: int) -> str:
    prefix, _ = _layer(name)
    return f"{prefix}{number}.{name.removeprefix(prefix).partition('.')[2]}"


def _plan(model: Architecture, vit: Layers, llm: Layers | None, vit_only: bool, ranks: int) -> _Plan:
    text, vision = model.text_config, getattr(model.config, "vision_config", None)
    if llm is None and not vit_only:
        raise ConfigError("to.llm_pp_layers: missing; give the language layers of each pipeline stage, such as [[36]]")
    plan = {_VISION: _flat("vit_pp_layers", vit, getattr(vision, "depth", 0))}
    if llm is not None and not vit_only:
        plan[_TEXT] = _flat("llm_pp_layers", llm, text.num_hidden_layers)
    if len({len(sizes) for sizes in plan.values()}) > 1:
        raise ConfigError(f"to.vit_pp_layers, to.llm_pp_layers: {vit} and {llm} are of different lengths; give each stage both")
    for what, count in (("key-value heads", text.num_key_value_heads), ("vision heads", getattr(vision, "num_heads", 0))):
        if count % ranks:
            raise ConfigError(f"to.tp_size: {ranks} does not divide the model's {count} {what}; choose a divisor")
    return _Plan(plan)


def _flat(key: str, given: Layers, layers: int) -> list[int]:
    nested = [sizes for sizes in given if isinstance(sizes, list)]
    if len(nested) > 1:
        raise ConfigError(f"to.{key}: {given} has virtual stages; rlcore writes one chunk a stage, as [[...]] with one list")
    sizes = nested[0] if nested else [size for size in given if isinstance(size, int)]
    if sum(sizes) != layers:
        raise ConfigError(f"to.{key}: {sizes} are {sum(sizes)} layers, the model has {layers}")
    return sizes


def _rank_folder(rank: int, stage: int, stages: int) -> str:
    return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")


def _iteration(source: Path) -> Path:
    tracker = source / TRACKER
    if not tracker.is_file():
        raise ConfigError(f"{tracker}: missing; give the folder that holds it and release/ or iter_N/")
    text = tracker.read_text(encoding="utf-8").strip()
    folder = source / (f"iter_{int(text):07d}" if text.isdigit() else text)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: missing; {TRACKER} names it")
    return folder


def _files(folder: Path) -> list[list[Path]]:
    """Files by stage, then by rank of tensor parallelism."""
    found = {
        (int(match[2] or 0), int(match[1])): path / FILE for path in folder.iterdir() if (match := _FOLDER.fullmatch(path.name))
    }
    if not found:
        raise ConfigError(f"{folder}: no mp_rank_* folders in it; is it a checkpoint of MindSpeed-MM?")
    stages, ranks = (max(numbers) + 1 for numbers in zip(*found, strict=True))
    places = product(range(stages), range(ranks))
    wanted = {(stage, rank): folder / _rank_folder(rank, stage, stages) / FILE for stage, rank in places}
    if missing := [path for place, path in wanted.items() if not found.get(place, path).is_file()]:
        raise ConfigError(f"{missing[0]}: missing ({len(missing)} of {len(wanted)} ranks' files); copy all of them")
    return [[found[stage, rank] for rank in range(ranks)] for stage in range(stages)]


def _opened(folder: Path, model: Architecture) -> Weights:
    """The weights under the hub's names."""
    rules = applied(_rules(model), model.expected, str(folder))
    return by_hub(rules, _gathered(_files(folder), {rule.other: rule for rule in rules}), model, str(folder))


def _gathered(files: list[list[Path]], rules: Mapping[str, Rule]) -> Weights:
    """Whole tensors of all stages, by their numbers in the whole model."""
    specs, shares = dict[str, Spec](), dict[str, list[tuple[Path, Stored, str]]]()
    offsets = {_VISION: 0, _TEXT: 0}
    for paths in files:
        ranks = [_entries(path) for path in paths]
        for local in ranks[0]:
            prefix, number = _layer(local)
            name = local if number is None else _renumbered(local, number + offsets[prefix])
            shares[name] = [(path, entries[local], local) for path, entries in zip(paths, ranks, strict=True)]
            specs[name] = spec_of(_whole(rules.get(name), [one.spec.meta() for _, one, _ in shares[name]]))
        for prefix in offsets:
            numbers = {number for kind, number in map(_layer, ranks[0]) if kind == prefix and number is not None}
            offsets[prefix] += len(numbers)

    def read(name: str) -> Tensor:
        return _whole(rules.get(name), [read_stored(path, one, local) for path, one, local in shares[name]])

    return Weights(specs, read)


def _whole(rule: Rule | None, shares: Sequence[Tensor]) -> Tensor:
    return rule.layout.gathered(shares) if rule else shares[0]


def _entries(path: Path) -> dict[str, Stored]:
    """One rank's tensors; empty states of layers are left out."""
    found = stored(path, _CLASSES)
    model = found.get("model") if isinstance(found, Mapping) else None
    if not isinstance(model, Mapping):
        held = ", ".join(map(str, list(found)[:6])) if isinstance(found, Mapping) else type(found).__name__
        raise ConfigError(f"{path}: no 'model' in it, but {held}; virtual stages (model0, model1) are not supported")
    entries = {name: one for name, one in model.items() if isinstance(one, Stored) and not name.endswith("_extra_state")}
    if left := [name for name, one in model.items() if name not in entries and not name.endswith("_extra_state")]:
        raise ConfigError(f"{path}: {few(left)}: not tensors")
    return entries

