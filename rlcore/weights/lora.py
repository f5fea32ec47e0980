"""LoRA weights in checkpoints (Hu et al., arXiv 2106.09685; names and scaling of the peft library): merged, or kept apart."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rlcore.errors import ConfigError
from rlcore.weights.architecture import Architecture
from rlcore.weights.tensors import Weights, few, selected

_FACTOR = re.compile(r"^(?P<layer>.+)\.(?P<factor>lora_[AB])(\.\w+)?\.weight$")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """Low-rank factors of one adapter, by layer of the module in memory."""

    factors: Weights  # `<layer>.lora_A.weight` [rank, in] and `<layer>.lora_B.weight` [out, rank]
    alpha: float
    options: Mapping[str, Any] = field(default_factory=dict)  # of adapter_config.json

    @property
    def layers(self) -> list[str]:
        return [name.removesuffix(".lora_A.weight") for name in self.factors.specs if name.endswith(".lora_A.weight")]

    def rank(self, layer: str) -> int:
        return self.factors.specs[f"{layer}.lora_A.weight"].shape[0]

    def scale(self, layer: str) -> float:
        patterns = dict(self.options.get("alpha_pattern") or {}).items()
        alpha = next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", layer)), self.alpha)
        rank = self.rank(layer)
        return alpha / (math.sqrt(rank) if self.options.get("use_rslora") else rank)

    def change(self, layer: str) -> Tensor:
        """[out, in] float32: what the adapter adds to the layer's weight."""
        a, b = (self.factors.read(f"{layer}.{factor}.weight").float() for factor in ("lora_A", "lora_B"))
        return b @ a * self.scale(layer)


def separated(source: Weights) -> tuple[Weights, Weights]:
    """The plain weights of a module wrapped by peft, under their names without it, and the low-rank factors."""
    plain, factors = dict[str, str](), dict[str, str]()
    for name in source.specs:
        short = name.replace(_PREFIX, "", 1).replace(".base_layer.", ".")
        if match := _FACTOR.match(short):
            factors[f"{match['layer']}.{match['factor']}.weight"] = name
        else:
            plain[short] = name
    return selected(source, plain), selected(source, factors)


def merged(weights: Weights, adapter: Adapter, model: Architecture, where: str) -> Weights:
    """`weights` (the hub's names, complete) plus the adapter's changes, added in float32. ConfigError when a factor is missing,
    has another shape, or belongs to no layer."""
    layers = {hub: name.removesuffix(".weight") for hub, name in model.module_names.items() if name.endswith(".weight")}
    changed = {hub: layer for hub, layer in layers.items() if layer in set(adapter.layers)}
    _check(weights, adapter, changed, where)

    def read(name: str) -> Tensor:
        tensor = weights.read(name)
        return (tensor.float() + adapter.change(changed[name])).to(tensor.dtype) if name in changed else tensor

    return Weights(weights.specs, read)


def _check(weights: Weights, adapter: Adapter, changed: Mapping[str, str], where: str) -> None:
    wanted = {f"{layer}.{factor}.weight" for layer in changed.values() for factor in ("lora_A", "lora_B")}
    found = adapter.factors.specs
    if options := [key for key in ("use_dora", "fan_in_fan_out", "modules_to_save") if adapter.options.get(key)]:
        raise ConfigError(f"{where}: {options[0]} of its adapter_config.json is set, which rlcore does not merge; use peft")
    if left := sorted(found.keys() - wanted):
        raise ConfigError(f"{where}: {len(left)} LoRA tensors belong to no layer of the model: {few(left)}")
    if missing := sorted(wanted - found.keys()):
        raise ConfigError(f"{where}: {len(missing)} LoRA tensors are missing: {few(missing)}")
    for hub, layer in changed.items():
        shape = (found[f"{layer}.lora_B.weight"].shape[0], found[f"{layer}.lora_A.weight"].shape[1])
        if shape != weights.specs[hub].shape or adapter.rank(layer) != found[f"{layer}.lora_B.weight"].shape[1]:
            wanted = list(weights.specs[hub].shape)
            raise ConfigError(f"{where}: {layer}: the LoRA factors make {list(shape)}, {hub} is {wanted}")

