"""FSDP checkpoints of ChatLearn: a file of `torch.save` for each rank, whose DTensors are that rank's shards.

    {ckpt_dir}/{iter}/model_world_size_{N}_rank_{R}.pt        (chatlearn/offline_ckpt_converter.py)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from rlcore.errors import ConfigError
from rlcore.weights.format import Content, Word, content_of, required
from rlcore.weights.pickles import Stored, assembled, read_stored, stored
from rlcore.weights.tensors import Weights, derived

_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
_GROUPED = re.compile(r"(?P<layer>.+)\.group_mlp\.(?P<kind>gate|up|down)(_proj\.weight|_weight)$")


class ChatLearn:
    """Written by FSDP and FSDP2 on any mesh, evenly split or not; grouped experts are split back."""

    words: ClassVar[Mapping[str, Word]] = {
        "hf_dir": "base", "ckpt_dir": "input", "save_dir": "output", "iter": "from.iter", "groupgemm": "from.groupgemm",
    }  # fmt: skip

    def read(self, source: Path, base: Path | None, *, iter: int, groupgemm: bool = False) -> Content:
        """Iteration `iter` of the checkpoints in `source`; `groupgemm` if the experts were trained grouped."""
        base = required(base, source)
        weights = _ranks(_files(source, iter))
        if groupgemm:
            experts = _experts(base)
            weights, _ = derived(weights, lambda name, tensor: _ungrouped(name, tensor, experts))
        return content_of(weights, base, source / str(iter))


def _files(source: Path, iteration: int) -> list[Path]:
    """Every rank's file, in rank order."""
    folder = source / str(iteration)
    if not folder.is_dir():
        there = sorted((path.name for path in source.iterdir() if path.name.isdigit()), key=int) if source.is_dir() else []
        raise ConfigError(f"--iter: {folder}: no such checkpoint; {source} has {', '.join(there) or 'none'}")
    found = {(int(match[1]), int(match[2])): path for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))}
    sizes = sorted({size for size, _ in found})
    if len(sizes) != 1:
        what = f"files of {len(sizes)} runs (world sizes {sizes})" if sizes else "no model_world_size_N_rank_R.pt"
        raise ConfigError(f"{folder}: {what}; it must hold one checkpoint")
    if missing := [rank for rank in range(sizes[0]) if (sizes[0], rank) not in found]:
        name = folder / f"model_world_size_{sizes[0]}_rank_{missing[0]}.pt"
        raise ConfigError(f"{name}: missing ({len(missing)} of {sizes[0]} ranks' files); copy all of them")
    return [found[sizes[0], rank] for rank in range(sizes[0])]


def _ranks(files: list[Path]) -> Weights:
    """Whole tensors from every rank's shards; one tensor's are in memory at a time."""
    ranks: list[Mapping[str, Stored]] = [stored(path) for path in files]
    for path, entries in zip(files, ranks, strict=True):
        _check(path, entries, files[0], ranks[0], len(ranks))
    return Weights({name: one.spec for name, one in ranks[0].items()}, partial(_whole, files, ranks))


def _check(path: Path, entries: Any, first_path: Path, first: Mapping[str, Stored], ranks: int) -> None:
    if not isinstance(entries, Mapping) or not all(isinstance(one, Stored) for one in entries.values()):
        raise ConfigError(f"{path}: not a state dict of tensors")
    if different := sorted(entries.keys() ^ first.keys()):
        raise ConfigError(f"{path}: {different[0]} is in only one of it and {first_path.name}; do they belong together?")
    for name, one in entries.items():
        if one.mesh and math.prod(one.mesh) != ranks:
            spread = f"{name} is spread over {math.prod(one.mesh)} ranks"
            raise ConfigError(f"{path}: {spread}, {ranks} have files; copy all of them")
        other = first[name]
        if (one.spec, one.mesh, one.splits) != (other.spec, other.mesh, other.splits):
            raise ConfigError(
                f"{path}: {name} is {list(one.shape)} on {one.mesh} ranks, {list(other.shape)} on {other.mesh} in"
                f" {first_path.name}; do they belong together?"
            )


def _whole(files: list[Path], ranks: list[Mapping[str, Stored]], name: str) -> Tensor:
    first = ranks[0][name]
    if not first.mesh:
        return read_stored(files[0], first, name)
    pieces = [read_stored(path, entries[name], name) for path, entries in zip(files, ranks, strict=True)]
    whole = assembled(pieces, first)
    if tuple(whole.shape) != first.shape:
        raise ConfigError(f"{files[0].parent}: {name}: the shards make {list(whole.shape)}, not {list(first.shape)}")
    return whole


def _experts(base: Path) -> int:
    from transformers import AutoConfig

    count = getattr(AutoConfig.from_pretrained(base), "num_experts", None)
    if not count:
        raise ConfigError(f"--groupgemm: {base / 'config.json'} has no num_experts; leave it out for a dense model")
    return count


def _ungrouped(name: str, tensor: Tensor, experts: int) -> Mapping[str, Tensor]:
    """`group_mlp.gate_proj.weight` [experts x out, in] as each expert's; `gate_weight` in ChatLearn's older versions."""
    match = _GROUPED.fullmatch(name)
    if not match:
        return {name: tensor}
    parts = tensor.chunk(experts) if tensor.shape[0] % experts == 0 else [tensor]
    return {f"{match['layer']}.experts.{e}.{match['kind']}_proj.weight": part for e, part in enumerate(parts)}
