"""Fused norms and rotary positions with few passes over memory: on a CPU their many small operations cost as much as the matrix
products between them. Forward and backward compute in float32, and save only their inputs (and the inverse rms)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.fused import Kernels


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) x weight (arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """[..., D], [D] -> [..., D]."""
        wide = states.to(torch.float32, copy=True)
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(len(weight)).add_(epsilon).rsqrt_()
        ctx.save_for_backward(states, weight, inverse)
        return wide.mul_(inverse).mul_(weight.float()).to(states.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        """Use torch's layer-norm gradient kernel: with a mean of 0 it lacks one term only, the mean of gradient x weight, which
        is added back."""
        (gradient,), (states, weight, inverse) = grad_outputs, ctx.saved_tensors
        wide, width = gradient.float(), len(weight)
        lost, mean = (wide @ weight.float())[..., None].mul_(inverse).div_(width), torch.zeros_like(inverse)
        of_states, _, _ = torch.ops.aten.native_layer_norm_backward(
            gradient.contiguous(), states, [width], mean, inverse, weight.float(), None, [True, False, False]
        )
        of_weight = states.to(torch.float32, copy=True).mul_(inverse).mul_(wide).flatten(0, -2).sum(0)
        return of_states.add_(lost.to(of_states.dtype)), of_weight.to(weight.dtype), None


class _Rotated(torch.autograd.Function):
    """x cos + (x2, x1) sine, where x1 and x2 are the halves of x and `sine` carries the sign of each half."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """[B, T, H, D], two [B, T, 1, D] -> [B, T, H, D]."""
        ctx.save_for_backward(cosine, sine)
        return _rotated(states, cosine, sine)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (cosine, sine) = grad_outputs, ctx.saved_tensors
        return _rotated(gradient, cosine, _swapped(sine)), None, None


def _rotated(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    other = _swapped(states).to(torch.float32).mul_(sine)
    return states.to(torch.float32, copy=True).mul_(cosine).add_(other).to(states.dtype)


def _swapped(states: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)


def rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    return _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)


def rotated(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Apply rotary positions (arXiv 2104.09864) to [B, H, T, D] and [B, K, T, D] by angles [B, T, D]."""
    first, second = sine.float().chunk(2, dim=-1)
    cosine, sine = cosine.float().unsqueeze(2), torch.cat((-first, second), dim=-1).unsqueeze(2)
    query, key = (_Rotated.apply(states.transpose(1, 2), cosine, sine).transpose(1, 2) for states in (query, key))
    return query, key


KERNELS = Kernels("Cpu", norm=rms_norm, rotated=rotated)
