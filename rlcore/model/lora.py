"""LoRA: low-rank updates of frozen weights (Hu et al., arXiv 2106.09685), by the peft library.

The model keeps the family's own class with its layers wrapped, so the forward pass is that of full training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rlcore.config.sections import LoraConfig
from rlcore.errors import ConfigError

_NAME = "default"  # peft's name of the only adapter here
_WRAPPED = ".base_layer"


def attach(
    model: Any, config: LoraConfig, skip: Tensor, frozen: Collection[str] = (), fused: Collection[str] = ()
) -> Any:  # fmt: skip
    """Attach LoRA to the linear layers that `targets` names and freeze everything else. Layers already `frozen` and the head,
    whose weight is `skip`, get none. `fused`: layers of the published model that are part of a larger tensor here.

    ConfigError when `targets` names a fused one, and lists the layers there are when none has such a name.
    """
    import peft

    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer.weight is not skip}
    if fused and (wrong := _fused_targets(config.targets, fused)):
        inside = {name.rpartition(".")[2] for name in fused}
        rest = ", ".join(sorted({name.rpartition(".")[2] for name in linear} - inside))
        raise ConfigError(
            f"model.lora.targets: {wrong} names layers of the experts, which are one tensor for all of them and get no LoRA;"
            f" name others ({rest}), or train without model.lora"
        )
    named = [
        name for name in linear
        if config.targets == "all-linear" or any(name == target or name.endswith(f".{target}") for target in config.targets)
    ]  # fmt: skip
    wanted = [name for name in named if name not in frozen]
    if not wanted:
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear if name not in frozen}))
        raise ConfigError(f"model.lora.targets: no linear layer that learns is called {config.targets}; the model has {ends}")
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - peft takes fractions too
        target_modules=wanted,
        lora_dropout=0.0,
    )
    model.requires_grad_(False)
    return peft.inject_adapter_in_model(settings, model, adapter_name=_NAME)


def _fused_targets(targets: Collection[str] | str, fused: Collection[str]) -> str | None:
    """What of the targets is in a fused tensor."""
    if isinstance(targets, str):
        return targets
    return next((one for one in targets if any(name == one or name.endswith(f".{one}") for name in fused)), None)


def has_lora(model: nn.Module) -> bool:
    return next(_wrapped(model), None) is not None


def merged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight with LoRA merged, under its name in the model without LoRA, one at a time."""
    layers = dict(_wrapped(model))
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        layer = layers.get(owner.removesuffix(_WRAPPED)) if owner.endswith(_WRAPPED) else None
        if ".lora_" in name:
            continue
        tensor = parameter.detach()
        if layer is not None and leaf == "weight":
            tensor = tensor + layer.get_delta_weight(_NAME).detach()
        yield name.replace(_WRAPPED, ""), tensor


def lora_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield `<layer>.lora_A.weight` [rank, in] and `<layer>.lora_B.weight` [out, rank] of every LoRA layer."""
    named = model.named_parameters()
    return ((name.replace(f".{_NAME}", ""), parameter) for name, parameter in named if ".lora_" in name)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Run the model without LoRA. LoRA weights keep requires_grad: FSDP2 takes a layer's gradient dtype from the parameters
    that require gradients at its first forward pass, and peft's own switch would leave none (pytorch #186998)."""
    layers = [layer for _, layer in _wrapped(model)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _wrapped(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight"))
