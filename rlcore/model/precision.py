"""Mixed-precision training (arXiv 1710.03740), the same in every placement.

Trainable weights, their gradients and moments are float32; a model runs on copies of them in the compute dtype, made once per
optimizer step. Frozen weights are held in the compute dtype. Activations are in the compute dtype; norms, softmax, rotary
tables, log-probabilities, losses and sums of gradients in float32. Where weights are sharded, FSDP2 makes the copies as it
gathers them (`distributed/fsdp.py`), with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def hold_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert frozen weights to `dtype`."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


class WorkingCopy:
    """Compute-dtype copies of weights that are kept in another dtype, for forward and backward passes.

    Backward accumulates the copies' gradients on the weights themselves, in float32.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, made_elsewhere: bool = False) -> None:
        """`made_elsewhere`: FSDP2 makes the copies, and this object does nothing."""
        self._weights = [] if made_elsewhere else [weight for weight in model.parameters() if weight.dtype != dtype]
        numbers = {weight: number for number, weight in enumerate(self._weights)}
        self._dtype = dtype
        self._copies: list[nn.Parameter] = []
        self._places = [
            (module._parameters, name, numbers[weight]) for module in model.modules()
            for name, weight in module._parameters.items() if weight is not None and weight in numbers
        ]  # fmt: skip
        self._made: Any = None  # state of the weights that the copies were made from

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run the model on the copies, refreshed if a weight has changed since. A fused optimizer does not bump a tensor's
        version, so it calls `expire`."""
        self._refresh()
        self._put(self._copies)
        try:
            yield
        finally:
            self._put(self._weights)

    def expire(self, *_: object) -> None:
        """Mark the copies stale: the weights have changed."""
        self._made = None

    def tensors(self) -> Sequence[Tensor]:
        """The existing copies, which occupy device memory."""
        return self._copies

    def _put(self, weights: Sequence[nn.Parameter]) -> None:
        for parameters, name, number in self._places:
            parameters[name] = weights[number]

    @torch.no_grad()
    def _refresh(self) -> None:
        state = [(weight.data_ptr(), weight._version) for weight in self._weights]
        if state == self._made:
            return
        if not self._copies:
            self._copies = [self._copy(weight) for weight in self._weights]
        elif self._weights:
            torch._foreach_copy_([*self._copies], [*self._weights])  # pyright: ignore[reportPrivateImportUsage]
        self._made = state

    def _copy(self, weight: nn.Parameter) -> nn.Parameter:
        copy = nn.Parameter(weight.to(self._dtype), requires_grad=weight.requires_grad)
        if weight.requires_grad:
            copy.register_post_accumulate_grad_hook(_added_to(weight))
        return copy


def _added_to(weight: nn.Parameter) -> Callable[[Tensor], None]:
    def add(copy: Tensor) -> None:
        assert copy.grad is not None
        if weight.grad is None:
            weight.grad = copy.grad.to(weight.dtype)
        else:
            weight.grad += copy.grad
        copy.grad = None

    return add


def lookup(weight: Tensor, token_ids: Tensor) -> Tensor:
    """Embedding lookup [V, D], [T] -> [T, D]. The gradient of a token that occurs many times is summed in float32."""
    return _Lookup.apply(weight, token_ids)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, token_ids: Tensor) -> Tensor:
        ctx.save_for_backward(token_ids)
        ctx.words = len(weight)
        return weight[token_ids]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,), (token_ids,) = grad_outputs, ctx.saved_tensors
        sums = torch.ops.aten.embedding_dense_backward(gradient.float(), token_ids, ctx.words, -1, False)
        return sums.to(gradient.dtype), None


def wide_tables(model: nn.Module) -> nn.Module:
    """Make the model's rotary tables float32 whatever its hidden states are. transformers rounds them to the hidden states'
    dtype, which it reads off its first argument alone; at position 1,000 a bf16 angle's sine is off by up to 0.004."""
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding") and hasattr(module, "inv_freq"):
            module.register_forward_pre_hook(_as_float32)
    return model


def _as_float32(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    states, *others = arguments
    if isinstance(states, Tensor) and states.is_floating_point():  # older vision towers request tables by length
        return states.new_empty(0, dtype=torch.float32), *others
    return arguments
