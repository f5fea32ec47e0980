"""How the experts of a mixture are computed: one grouped matrix product over all of them, or one expert after another.

Both are transformers' own. The loop is plain torch and the yardstick; its backward pass makes a gradient of all experts' size
for each expert.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rlcore.errors import ConfigError
from rlcore.model.routing import routers_of

_TOKENS = (0, 3, 0, 5)  # of the probe's experts


def choose(model: Any, grouped: bool | None, device: torch.device, dtype: torch.dtype) -> None:
    """Have the model's experts computed by a grouped product; None: where the device has one.

    ConfigError if it is asked for and the model has no experts, or the device no such product.
    """
    if not routers_of(model):
        if grouped:
            raise ConfigError(f"model.groupgemm: a {model.config.model_type} has no experts; remove it")
        return
    fault = None if grouped is False else grouped_fault(device, dtype)
    if grouped and fault:
        raise ConfigError(
            f"model.groupgemm: this {device.type} has no grouped product of {dtype} that works: {fault}; set it to false, which"
            " computes the experts one by one"
        )
    model.set_experts_implementation("eager" if grouped is False or fault else "grouped_mm")


def grouped_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch's grouped product cannot be used on this device, found by computing a small one forward and backward; None if
    it can."""
    product = getattr(nn.functional, "grouped_mm", None)
    if product is None:
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    try:
        found = _probe(device, dtype, lambda states, weights, ends: product(states, weights, offs=ends))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return " ".join(str(error).split())
    wanted = _probe(device, dtype, _one_by_one)
    limit = 1e-5 if dtype == torch.float32 else 5e-2
    apart = max(float((one - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True))
    return None if apart < limit else f"its result is off by {apart:.1e}"


def _probe(device: torch.device, dtype: torch.dtype, product: Any) -> list[Tensor]:
    """Output of a product over experts, two of them without a token, and its gradients, in float32 on the host."""
    random = torch.Generator().manual_seed(0)
    states, weights, slope = (
        torch.randn(shape, generator=random).to(device, dtype)
        for shape in ((sum(_TOKENS), 64), (len(_TOKENS), 64, 32), (sum(_TOKENS), 32))
    )
    ends = torch.tensor(_TOKENS, device=device).cumsum(0, dtype=torch.int32)
    with torch.enable_grad():
        output = product(states.requires_grad_(), weights.requires_grad_(), ends)
        gradients = torch.autograd.grad(output, (states, weights), slope)
    return [tensor.detach().float().cpu() for tensor in (output, *gradients)]


def _one_by_one(states: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    places = pairwise([0, *ends.tolist()])
    return torch.cat([states[begin:end] @ weights[number] for number, (begin, end) in enumerate(places)])
