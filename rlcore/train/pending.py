"""Samples that wait for their step, in a checkpoint: what was drawn ahead (placement.max_staleness)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from rlcore.errors import ConfigError
from rlcore.train.sampling import Sampled, Scored
from rlcore.types import Group, Prompt, Receipt, Sample, Score

FILE = "sampled.safetensors"
_ABOUT = "sampled"


def packed(sampled: Sampled) -> bytes:
    """A safetensors file: tokens and log-probabilities of all samples in a row, the rest as JSON in its header."""
    both = sampled.kept + sampled.replaced
    samples = [sample for group in both.groups for sample in group.samples]
    about = {
        "kept": len(sampled.kept.groups),
        "rows": [group.prompt.row.id for group in both.groups],
        "samples": [[sample.text, sample.finish, sample.policy_version, len(sample.token_ids)] for sample in samples],
        "scores": [[asdict(score) for score in scores] for scores in both.scores],
        "receipt": asdict(sampled.receipt), "drawn": sampled.drawn, "dropped_long": sampled.dropped_long,
    }  # fmt: skip
    arrays = {
        name: torch.cat([torch.from_numpy(getattr(sample, name)) for sample in samples]) for name in ("token_ids", "logprobs")
    }
    return save(arrays, {_ABOUT: json.dumps(about)})


def unpacked(path: Path, draw: Callable[[int], Sequence[Prompt]]) -> Sampled:
    """What `packed` made a file of. `draw` draws the prompts again, which the file has not; ConfigError if they are others."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[_ABOUT])
        tokens, logprobs = file.get_tensor("token_ids").numpy(), file.get_tensor("logprobs").numpy()
    prompts = {prompt.row.id: prompt for prompt in draw(len(about["rows"]))}
    if missing := [row for row in about["rows"] if row not in prompts]:
        raise ConfigError(f"{path}: samples of row {missing[0]}, which data.train does not draw next; the rows have changed")
    samples, end = list[Sample](), 0
    for text, finish, version, length in about["samples"]:
        begin, end = end, end + length
        samples.append(Sample(tokens[begin:end], logprobs[begin:end], text, finish, version))
    scores = [[Score(**score) for score in one] for one in about["scores"]]
    rest = iter(samples)
    groups = [Group(prompts[row], [next(rest) for _ in one]) for row, one in zip(about["rows"], scores, strict=True)]
    kept = about["kept"]
    return Sampled(
        Scored(groups[:kept], scores[:kept]), Scored(groups[kept:], scores[kept:]), Receipt(**about["receipt"]),
        about["drawn"], about["dropped_long"],
    )  # fmt: skip
