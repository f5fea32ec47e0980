"""Samples that wait for their step, in a checkpoint: what was drawn ahead (placement.max_staleness)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from rlcore.errors import ConfigError
from rlcore.train.sampling import Sampled, Scored
from rlcore.types import Group, Prompt, Receipt, Sample, Score

FILE = "sampled.safetensors"
_ABOUT = "sampled"
_ARRAYS = ("token_ids", "logprobs", "experts")


def packed(sampled: Sampled) -> bytes:
    """A safetensors file: arrays of all samples in a row, the rest as JSON in its header."""
    both = sampled.kept + sampled.replaced
    samples = [sample for group in both.groups for sample in group.samples]
    about = {
        "kept": len(sampled.kept.groups),
        "rows": [group.prompt.row.id for group in both.groups],
        "samples": [[sample.text, sample.finish, sample.policy_version, _lengths(sample)] for sample in samples],
        "scores": [[asdict(score) for score in scores] for scores in both.scores],
        "receipt": asdict(sampled.receipt), "drawn": sampled.drawn, "dropped_long": sampled.dropped_long,
    }  # fmt: skip
    arrays = {name: [array for sample in samples if (array := getattr(sample, name)) is not None] for name in _ARRAYS}
    joined = {name: torch.from_numpy(np.concatenate(one)) for name, one in arrays.items() if one}
    return save(joined, {_ABOUT: json.dumps(about)})


def unpacked(path: Path, draw: Callable[[int], Sequence[Prompt]]) -> Sampled:
    """What `packed` made a file of. `draw` draws the prompts again, which the file has not; ConfigError if they are others."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[_ABOUT])
        arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}
    prompts = {prompt.row.id: prompt for prompt in draw(len(about["rows"]))}
    if missing := [row for row in about["rows"] if row not in prompts]:
        raise ConfigError(f"{path}: samples of row {missing[0]}, which data.train does not draw next; the rows have changed")
    samples, ends = list[Sample](), dict.fromkeys(arrays, 0)
    for text, finish, version, lengths in about["samples"]:
        begins, ends = ends, {name: end + lengths[name] for name, end in ends.items()}
        own = {name: array[begins[name] : ends[name]] for name, array in arrays.items()}
        samples.append(Sample(text=text, finish=finish, policy_version=version, **own))
    scores = [[Score(**score) for score in one] for one in about["scores"]]
    rest = iter(samples)
    groups = [Group(prompts[row], [next(rest) for _ in one]) for row, one in zip(about["rows"], scores, strict=True)]
    kept = about["kept"]
    return Sampled(
        Scored(groups[:kept], scores[:kept]), Scored(groups[kept:], scores[kept:]), Receipt(**about["receipt"]),
        about["drawn"], about["dropped_long"],
    )  # fmt: skip


def _lengths(sample: Sample) -> dict[str, int]:
    return {name: len(array) for name in _ARRAYS if (array := getattr(sample, name)) is not None}
