"""Bytes that forward and backward passes allocate, found by running the model's own code on shapes instead of numbers.

The model is on torch's meta device, so nothing is computed and no weights are read. A dispatch mode sees every operation and
counts the tensors that are alive: what autograd saves, what checkpointing computes again, the head's tiles, temporaries.
Integers (token ids, image grids, indices) stay real, since their values decide shapes. Counting live storages under a dispatch
mode follows torch's MemTracker (torch.distributed._tools).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AttentionInterface

from rlcore.model.attention import packed_attention
from rlcore.model.precision import WorkingCopy, hold_frozen
from rlcore.model.resolved import ResolvedModel
from rlcore.protocols import VisionModelFamily
from rlcore.types import Packed, Segment, Vision

META = torch.device("meta")
_ATTENTION = "rlcore_shapes"
_FIRST = (Segment(0, 1, ()),)


class Ledger(TorchDispatchMode):
    """Counts the bytes of tensors that are created while it is active: those alive, and their peak."""

    def __init__(self, outside: Iterable[Tensor]) -> None:
        """`outside`: tensors that exist already, views of which are not counted."""
        super().__init__()
        self.live = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._known = {one.untyped_storage()._cdata for one in outside}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == META and _holds_values(args[0]):
            kwargs = {**kwargs, "device": args[0].device}
        elif len({one.is_meta for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}) > 1:
            args, kwargs = tree_map(_shape_of, (args, kwargs))
        result = func(*args, **kwargs)
        for one in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(one, Tensor):
                self._add(one.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known.add(key)
            self._alive[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        del self._alive[key]
        self.live -= size


def model_of_shapes(resolved: ResolvedModel, folder: Path, trained: bool) -> nn.Module:
    """The model of `folder` on the meta device: with its settings for training, or all of it frozen. Its attention keeps what
    packed attention keeps, without the temporaries of a tile; kernels of devices other than the CPU do not run on shapes."""
    model = resolved.family.meta_model(folder, torch.float32)
    cast(Any, model).set_attn_implementation(_ATTENTION)
    if not resolved.backend.own_memory:
        model = resolved.backend.fuse(model)
    return (resolved.trainable(model) if trained else model.requires_grad_(False)).to(META)


def packed_row(tokens: int, targets: int) -> Packed:
    """A row of text."""
    inputs, predicted = torch.zeros(tokens, dtype=torch.int64), torch.zeros(targets, dtype=torch.int64)
    segments = (Segment(0, tokens, ()),)
    return Packed(inputs, torch.arange(tokens), segments, predicted, predicted, predicted, names=("",), vision=(None,))


def training_bytes(
    forward: nn.Module, dtype: torch.dtype, run: Callable[[], Tensor], whole: bool = True, again: bool = False
) -> int:
    """Peak bytes of `run`, which gives a loss, and its backward pass, weights left out.

    `whole`: the model is on this device, runs on working copies and keeps its gradients, which count, and of which there are
    some before if it runs `again`. Otherwise FSDP2 gathers weights in `dtype` and reduces gradients; neither counts.
    """
    hold_frozen(forward, dtype)
    if not whole:
        for weight in forward.parameters():
            weight.data = weight.data.to(dtype)
    working = WorkingCopy(forward, dtype, made_elsewhere=not whole)
    with working():  # makes the copies
        outside = [*forward.parameters(), *forward.buffers()]
    outside += forward.parameters()
    hooks = []
    for weight in forward.parameters():
        if weight.requires_grad and not whole:
            hooks.append(weight.register_post_accumulate_grad_hook(_dropped))
        elif weight.requires_grad and again:
            weight.grad = torch.empty_like(weight)
    before = [weight.grad for weight in forward.parameters() if weight.grad is not None]
    with Ledger([*outside, *before]) as ledger, working():
        run().backward()
    for hook in hooks:
        hook.remove()
    forward.zero_grad()
    return ledger.peak + sum(gradient.nbytes for gradient in before)


@torch.no_grad()
def forward_bytes(module: nn.Module, dtype: torch.dtype, run: Callable[[], object]) -> int:
    """Peak bytes of `run` without gradients, weights in `dtype` left out."""
    for weight in module.parameters():
        weight.data = weight.data.to(dtype)
    with Ledger([*module.parameters(), *module.buffers()]) as ledger:
        run()
    return ledger.peak


def image_bytes(
    family: VisionModelFamily, tower: nn.Module, dtype: torch.dtype, vision: Vision, trained: bool
) -> tuple[int, int]:
    """Peak bytes of the tower's pass over these images, with its backward pass if `trained`, and bytes of what it returns."""
    tower.requires_grad_(trained)
    for weight in tower.parameters():
        weight.data = weight.data.to(dtype)
    hooks = [weight.register_post_accumulate_grad_hook(_dropped) for weight in tower.parameters() if trained]
    with Ledger([*tower.parameters(), *tower.buffers()]) as ledger, nullcontext() if trained else torch.no_grad():
        images = family.embed_images(tower, vision)
        size = sum(image.nbytes for image in images)
        if trained:
            torch.cat(list(images)).sum().backward()
    for hook in hooks:
        hook.remove()
    return ledger.peak, size


def _dropped(weight: Tensor) -> None:
    weight.grad = None


def _holds_values(one: Any) -> bool:
    return isinstance(one, Tensor) and not one.is_meta and not one.is_floating_point()


def _shape_of(one: Any) -> Any:
    return torch.empty_like(one, device=META) if isinstance(one, Tensor) and not one.is_meta and one.dim() else one


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Packed attention over a row whose only span is its first token: all tensors of the row, and next to no tile."""
    return packed_attention(module, query, key, value, attention_mask, segments=_FIRST, scaling=scaling)


AttentionInterface.register(_ATTENTION, _attention)
