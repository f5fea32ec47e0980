"""MindSpeed-MM's checkpoints of Qwen2.5-VL: a file of `torch.save` for each rank of tensor and pipeline parallelism.

    release/mp_rank_{TP:02}[_{PP:03}]/model_optim_rng.pt        latest_checkpointed_iteration.txt holds "release"

Layers are numbered from 0 in each pipeline stage; a stage has its own number of vision and of language layers. Which tensors
there are, and how ranks share them, does not depend on the model's config, so a checkpoint is split again without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from rlcore.errors import ConfigError
from rlcore.weights.architecture import Architecture, architecture
from rlcore.weights.format import Command, Content, Word, content_of, nothing, required
from rlcore.weights.output import Draft
from rlcore.weights.pickles import Stored, read_stored, stored, write_pickle
from rlcore.weights.tensors import Spec, Weights, few, selected, spec_of

from .layouts import GroupedQKV, Layout
from .tables import GATE_UP, ROWS, WHOLE, Rule, applied, by_hub, decoder_rules, joined_by, layout_of, tower_rules

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
_HEAD, _EMBEDDING = "text_decoder.output_layer.weight", "text_decoder.embedding.word_embeddings.weight"
_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_CLASSES = ("megatron.", "mindspeed", "argparse.Namespace")  # of the arguments that a run saves beside its weights


def _rules(text: Any, vision: Any) -> list[Rule]:
    """The table of names, with layouts for these configs."""
    return decoder_rules(text, _NORMS, "text_decoder.") + tower_rules(vision, f"{_VISION}{{i}}.", _NORMS, _OUTSIDE)


_HEADS = SimpleNamespace(num_attention_heads=1, num_key_value_heads=1, num_heads=1)  # no matter how many: ranks have whole ones
_TABLE = [
    Rule(rule.hub, rule.other, ROWS if isinstance(rule.layout, GroupedQKV) else rule.layout) for rule in _rules(_HEADS, _HEADS)
]


def _sizes(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{key}": f"{ours}.{key}" for key in ("llm_pp_layers", "vit_pp_layers", "tp_size")}


class MindSpeed:
    """Whole models, and vision towers alone, which can be written and split again but are no model to read."""

    words: ClassVar[Mapping[str, Word]] = {}
    commands: ClassVar[Mapping[str, Command]] = {
        "Qwen2_5_VLConverter hf_to_mm": Command("huggingface", "mindspeed", {
            "cfg.hf_config.hf_dir": "input", "cfg.mm_dir": "output", **_sizes("cfg.parallel_config", "to"),
            "cfg.trust_remote_code": nothing,
        }),
        "Qwen2_5_VLConverter mm_to_hf": Command("mindspeed", "huggingface", {
            "cfg.mm_dir": "input", "cfg.save_hf_dir": "output", "cfg.hf_config.hf_dir": "base",
            **_sizes("cfg.parallel_config", "from"), "cfg.trust_remote_code": nothing,
        }),
        "Qwen2_5_VLConverter resplit": Command("mindspeed", "mindspeed", {
            "cfg.source_dir": "input", "cfg.target_dir": "output", **_sizes("cfg.source_parallel_config", "from"),
            **_sizes("cfg.target_parallel_config", "to"),
        }),
    }  # fmt: skip

    def read(
        self, source: Path, base: Path | None, *, vit_pp_layers: Layers | None = None, llm_pp_layers: Layers | None = None,
        tp_size: PositiveInt | None = None,
    ) -> Content:  # fmt: skip
        """The newest iteration. Parallel sizes are those of the files; ConfigError where others are given."""
        base = required(base, source)
        model = architecture(base)
        _check_kind(model)
        whole = self.whole(source, vit_pp_layers=vit_pp_layers, llm_pp_layers=llm_pp_layers, tp_size=tp_size)
        return content_of(_by_hub(whole, model, source), base, source)

    def write(
        self, content: Content, draft: Draft, *, vit_pp_layers: Layers, llm_pp_layers: Layers | None = None,
        tp_size: PositiveInt = 1, vit_only: bool = False,
    ) -> Weights:  # fmt: skip
        """One tensor is in memory at a time. `vit_only` writes what `vit_config.load` wants: the tower and its projector.

        ConfigError for sizes that do not fit the model.
        """
        model = content.model
        _check_kind(model)
        _check_heads(model, tp_size)
        names = [name for name in content.weights.specs if not vit_only or name.startswith("visual.")]
        rules = applied(_rules(model.text_config, model.config.vision_config), names, "to mindspeed")
        whole = joined_by(rules, content.weights)
        written = self._written(whole, draft, _plan(whole, vit_pp_layers, llm_pp_layers), tp_size)
        found = _by_hub(written, model, draft.folder)
        return Weights({name: found.specs[name] for name in names}, found.read)

    def whole(
        self, source: Path, *, vit_pp_layers: Layers | None = None, llm_pp_layers: Layers | None = None,
        tp_size: PositiveInt | None = None,
    ) -> Weights:  # fmt: skip
        """The newest iteration's tensors under MindSpeed-MM's names, whole, with their numbers in the whole model."""
        files = _files(_iteration(source))
        if tp_size not in (None, len(files[0])):
            raise ConfigError(f"from.tp_size: {tp_size}, but {source} has files of {len(files[0])} tensor parallel ranks")
        weights, stages = _gathered(files)
        for key, given, prefix in (("vit_pp_layers", vit_pp_layers, _VISION), ("llm_pp_layers", llm_pp_layers, _TEXT)):
            if given is not None and _flat(f"from.{key}", given) != (found := [sizes[prefix] for sizes in stages]):
                raise ConfigError(f"from.{key}: {given}, but the stages in {source} have {found} layers")
        return weights

    def split(
        self, whole: Weights, draft: Draft, *, vit_pp_layers: Layers, llm_pp_layers: Layers | None = None,
        tp_size: PositiveInt = 1,
    ) -> Weights:  # fmt: skip
        """Write such tensors. A head that equals the embedding counts as tied: it is there where there are several stages."""
        names = {name: name for name in whole.specs}
        if {_HEAD, _EMBEDDING} <= names.keys() and torch.equal(whole.read(_HEAD), whole.read(_EMBEDDING)):
            del names[_HEAD]
        written = self._written(selected(whole, names), draft, _plan(whole, vit_pp_layers, llm_pp_layers), tp_size)
        return selected(written, {name: name if name in written.specs else _EMBEDDING for name in whole.specs})

    def _written(self, whole: Weights, draft: Draft, plan: _Plan, ranks: int) -> Weights:
        """Write a file for each rank. The last of several stages has a head, of a tied model too: it cannot reach the
        embedding."""
        names = {name: name for name in whole.specs}
        if plan.stages > 1 and _EMBEDDING in names:
            names.setdefault(_HEAD, _EMBEDDING)
        whole = selected(whole, names)
        _check_shares(whole, ranks)
        draft.require(whole.nbytes)
        for stage in range(plan.stages):
            here = selected(whole, {plan.local(name): name for name in whole.specs if plan.stage(name) == stage})
            for rank in range(ranks):
                path = draft.folder / "release" / _rank_folder(rank, stage, plan.stages) / FILE
                path.parent.mkdir(parents=True)
                write_pickle(path, "model", _shares(here, rank, ranks), {"checkpoint_version": 3.0})
        (draft.folder / TRACKER).write_text("release", encoding="utf-8")
        return self.whole(draft.folder)


def _check_kind(model: Architecture) -> None:
    if getattr(model.config, "vision_config", None) is None:
        raise ConfigError(f"{model.folder}: MindSpeed-MM holds vision-language models; this is a {model.config.model_type}")


def _check_heads(model: Architecture, ranks: int) -> None:
    heads = {"key-value heads": model.text_config.num_key_value_heads, "vision heads": model.config.vision_config.num_heads}
    for what, count in heads.items():
        if count % ranks:
            raise ConfigError(f"to.tp_size: {ranks} does not divide the model's {count} {what}; choose a divisor")


def _check_shares(whole: Weights, ranks: int) -> None:
    if unknown := [name for name in whole.specs if layout_of(_TABLE, name) is None]:
        raise ConfigError(f"to mindspeed: {len(unknown)} tensors are not in the table of names: {few(unknown)}")
    for name, layout in ((name, _layout(name)) for name in whole.specs):
        axis, parts = layout.dimension, ranks * (2 if layout == GATE_UP else 1)
        if axis is not None and (size := whole.specs[name].shape[axis]) % parts:
            raise ConfigError(f"to.tp_size: {ranks} ranks cannot share the {size} rows or columns of {name}; choose a divisor")


def _layout(name: str) -> Layout:
    return layout_of(_TABLE, name) or WHOLE


def _shares(whole: Weights, rank: int, ranks: int) -> Weights:
    """One rank's part of each tensor."""

    def share(name: str, tensor: Tensor) -> Tensor:
        return _layout(name).shares(tensor, ranks)[rank]

    specs = {name: spec_of(share(name, spec.meta())) for name, spec in whole.specs.items()}
    return Weights(specs, lambda name: share(name, whole.read(name)).contiguous())


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
    match = re.match(rf"{re.escape(prefix)}(\d+)\.", name)
    return prefix, int(match[1]) if match else None


def _renumbered(name: str, number: int) -> str:
    prefix, _ = _layer(name)
    return f"{prefix}{number}.{name.removeprefix(prefix).partition('.')[2]}"


def _plan(whole: Weights, vit: Layers, llm: Layers | None) -> _Plan:
    there = {prefix: len(numbers) for prefix, numbers in _numbers(whole.specs).items()}
    if llm is None and _TEXT in there:
        raise ConfigError("to.llm_pp_layers: missing; give the language layers of each pipeline stage, such as [[36]]")
    plan = {_VISION: _flat("to.vit_pp_layers", vit)}
    if llm is not None and _TEXT in there:
        plan[_TEXT] = _flat("to.llm_pp_layers", llm)
    for key, prefix in (("vit_pp_layers", _VISION), ("llm_pp_layers", _TEXT)):
        if prefix in plan and sum(plan[prefix]) != there.get(prefix, 0):
            given = f"{plan[prefix]} are {sum(plan[prefix])} layers"
            raise ConfigError(f"to.{key}: {given}, the model has {there.get(prefix, 0)}")
    if len({len(sizes) for sizes in plan.values()}) > 1:
        raise ConfigError(f"to.vit_pp_layers, to.llm_pp_layers: {vit} and {llm} are of different lengths; give each stage both")
    return _Plan(plan)


def _flat(key: str, given: Layers) -> list[int]:
    nested = [sizes for sizes in given if isinstance(sizes, list)]
    if len(nested) > 1:
        raise ConfigError(f"{key}: {given} has virtual stages; rlcore has one chunk a stage, as [[...]] with one list")
    return nested[0] if nested else [size for size in given if isinstance(size, int)]


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


def _by_hub(whole: Weights, model: Architecture, where: Path) -> Weights:
    """The weights under the hub's names."""
    rules = applied(_rules(model.text_config, model.config.vision_config), model.expected, str(where))
    return by_hub(rules, whole, model, str(where))


def _gathered(files: list[list[Path]]) -> tuple[Weights, list[dict[str, int]]]:
    """Whole tensors of all stages, by their numbers in the whole model; and each stage's layers by their prefix."""
    specs, shares = dict[str, Spec](), dict[str, list[tuple[Path, Stored, str]]]()
    stages: list[dict[str, int]] = []
    for paths in files:
        ranks = [_entries(path) for path in paths]
        for path, entries in zip(paths, ranks, strict=True):
            if different := sorted(entries.keys() ^ ranks[0].keys()):
                raise ConfigError(f"{path}: {different[0]} is in only one of it and {paths[0]}; do they belong together?")
        numbers = _numbers(ranks[0])
        _check_layers(ranks[0], numbers, paths[0])
        for local in ranks[0]:
            prefix, number = _layer(local)
            before = sum(sizes[prefix] for sizes in stages)
            name = local if number is None else _renumbered(local, number + before)
            if name in shares:
                raise ConfigError(f"{paths[0]}: {name} is in another stage too; do they belong together?")
            shares[name] = [(path, entries[local], local) for path, entries in zip(paths, ranks, strict=True)]
            specs[name] = spec_of(_layout(name).gathered([one.spec.meta() for _, one, _ in shares[name]]))
        stages.append({prefix: len(numbers.get(prefix, ())) for prefix in (_VISION, _TEXT)})

    def read(name: str) -> Tensor:
        return _layout(name).gathered([read_stored(path, one, local) for path, one, local in shares[name]])

    return Weights(specs, read), stages


def _numbers(names: Iterable[str]) -> dict[str, set[int]]:
    """Numbers of the layers of each kind that is there at all."""
    found = dict[str, set[int]]()
    for prefix, number in map(_layer, names):
        found.setdefault(prefix, set()).update(() if number is None else (number,))
    return found


def _check_layers(names: Iterable[str], numbers: Mapping[str, set[int]], path: Path) -> None:
    """ConfigError unless layers are numbered from 0 and all of a kind have the same tensors."""
    for prefix, found in numbers.items():
        held = {number: {name for name in names if _layer(name) == (prefix, number)} for number in found}
        wanted = {_renumbered(name, 0) for layer in held.values() for name in layer}
        due = [_renumbered(name, number) for number in range(max(found, default=-1) + 1) for name in sorted(wanted)]
        if missing := sorted(set(due).difference(*held.values())):
            raise ConfigError(f"{path}: {len(missing)} tensors are missing: {few(missing)}; other layers have them")


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

