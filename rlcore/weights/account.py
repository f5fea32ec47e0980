"""Every tensor accounted for: under the hub's names, complete and well shaped, or an error that lists what is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rlcore.errors import ConfigError
from rlcore.weights.architecture import Architecture
from rlcore.weights.tensors import Weights, derived, few, selected


@dataclass(frozen=True)
class Accounted:
    """Complete weights of a model under the hub's names."""

    weights: Weights
    untied: bool = False  # the config ties the head to the embedding, the checkpoint holds another


def accounted(source: Weights, model: Architecture, where: str) -> Accounted:
    """The tensors of `source`, in any naming era, as the model's; ConfigError, after `where` they come from, lists what is
    missing, left over, misshapen or there twice.

    A tied tensor may be missing; stored with the same values it is left out, as `save_pretrained` does, with others kept.
    """
    weights, origins = derived(source, model.hub)
    names = {name: name for name in weights.specs}
    for target, shared in model.tied.items():
        if target in names and shared not in names:
            names[shared] = names.pop(target)
    weights = selected(weights, names)
    _check(weights, model, where, {name: origin for name, origin in origins.items() if len(origin) > 1})
    stored = [(target, shared) for target, shared in model.tied.items() if target in weights.specs]
    same = {target for target, shared in stored if torch.equal(weights.read(target), weights.read(shared))}
    kept = {name: name for name in weights.specs if name not in same}
    return Accounted(selected(weights, kept), untied=len(stored) > len(same))


def _check(weights: Weights, model: Architecture, where: str, twice: Mapping[str, list[str]]) -> None:
    found = weights.specs
    missing = [name for name in model.expected if name not in found and name not in model.tied]
    left = [name for name in found if name not in model.expected]
    misshapen = [
        f"{name} is {list(found[name].shape)}, not {list(shape)}"
        for name, shape in model.expected.items()
        if name in found and found[name].shape != shape
    ]
    double = [f"{name} from {' and '.join(origins)}" for name, origins in twice.items()]
    lists = {"missing": missing, "left over": left, "misshapen": misshapen, "there twice": double}
    if wrong := [f"  {len(names)} {what}: {few(names)}" for what, names in lists.items() if names]:
        kind = type(model.model).__name__
        raise ConfigError(
            "\n".join([
                f"{where}: not the weights of a {kind} as {model.folder / 'config.json'} describes it", *wrong,
                "  is the checkpoint complete, and does the base model have its architecture?",
            ])
        )  # fmt: skip


def prefix_of(source: Weights, model: Architecture) -> str:
    """The prefix under which a checkpoint has most of the model's tensors: `fsdp_checkpoint.model.` for one."""
    known = [*model.in_memory, *model.expected]
    probes = known[:: max(1, len(known) // 8)]  # one would do, unless just that tensor is missing
    prefixes = sorted({name[: -len(probe)] for probe in probes for name in source.specs if name.endswith(probe)})
    return max(prefixes, key=lambda prefix: sum(prefix + name in source.specs for name in known), default="")


def below(source: Weights, prefix: str) -> Weights:
    """The tensors under a prefix, named without it."""
    return selected(source, {name.removeprefix(prefix): name for name in source.specs if name.startswith(prefix)})
