"""Dispatch of operators on npu tensors to CPU kernels.

An npu tensor and a CPU tensor can share the same bytes: a DLPack capsule passes a tensor between libraries without a copy, and
one of its fields names the device. With that field rewritten, torch imports a CPU tensor as an npu tensor, or the reverse. So
one fallback for every operator relabels its npu arguments as CPU tensors, runs the CPU kernel, and relabels the results as npu.
For a view, the CPU kernel runs on the npu tensor itself: it reads no bytes, and the result shares its storage.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import device, storage

aten = torch.ops.aten
_PROCESSOR, _OTHER = 1, 12  # DLPack device types
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::dot")
PLACED = ("aten::index", "aten::_index_put_impl_")  # indices may be CPU tensors
_IN_LOW_PRECISION = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "scaled_dot_product_attention")
_IN_FLOAT32 = ("softmax.int", "log_softmax.int", "exp", "log", "pow.Tensor_Scalar", "sum", "sum.dim_IntList")

counts: Counter[str] = Counter()  # operators run on npu tensors
_libraries: list[torch.library.Library] = []  # keeps the registrations alive

_open = ctypes.pythonapi.PyCapsule_GetPointer
_open.restype, _open.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _Managed(ctypes.Structure):
    """The leading fields of a DLManagedTensor."""

    _fields_ = (("data", ctypes.c_void_p), ("kind", ctypes.c_int32), ("number", ctypes.c_int32))


class DeviceMismatch(RuntimeError):
    pass


def on_device(tensor: Tensor) -> Tensor:
    """View the bytes as a tensor on npu:0."""
    device.labelled += tensor.nbytes
    labelled = _labelled(tensor, _OTHER)
    storage.taken(labelled)
    return labelled


def on_host(tensor: Tensor) -> Tensor:
    """View the bytes as a CPU tensor."""
    return _labelled(tensor, _PROCESSOR) if tensor.device.type == "npu" else tensor


def _labelled(tensor: Tensor, kind: int) -> Tensor:
    capsule = torch._C._to_dlpack(tensor.resolve_conj().resolve_neg())
    ctypes.cast(_open(capsule, b"dltensor"), ctypes.POINTER(_Managed)).contents.kind = kind
    return torch._C._from_dlpack(capsule)


class _Loan:
    """The npu arguments of one call, relabelled as CPU tensors."""

    def __init__(self, operator: str) -> None:
        self.operator = operator
        self.lent: list[tuple[Tensor, Tensor]] = []  # npu, cpu
        self.stays: Tensor | None = None  # a CPU argument

    def take(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self._tensor(argument)
        if isinstance(argument, list | tuple):
            return type(argument)(self.take(each) for each in argument)
        return torch.device("cpu") if isinstance(argument, torch.device) and argument.type == "npu" else argument

    def give_back(self, result: Any) -> Any:
        """Relabel results as npu; an argument written in place is returned as itself."""
        if isinstance(result, Tensor):
            mine = next((npu for npu, lent in self.lent if lent is result), None)
            return on_device(result) if mine is None else mine
        return type(result)(self.give_back(each) for each in result) if isinstance(result, list | tuple) else result

    def check(self) -> None:
        places = self.operator in PLACED and self.stays is not None and not self.stays.is_floating_point()
        if self.lent and self.stays is not None and not places:
            raise DeviceMismatch(f"{self.operator}: tensors of npu:0 and of the processor, the latter {list(self.stays.shape)}")
        if self.operator in PRODUCTS and any(not lent.is_floating_point() for _, lent in self.lent):
            raise RuntimeError(f"{self.operator}: npu has no product of integers")

    def _tensor(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "npu":
            self.stays = tensor if tensor.dim() else self.stays  # scalars may be on any device
            return tensor
        self.lent.append((tensor, on_host(tensor)))
        return self.lent[-1][1]


def _fallback(operator: Any, *arguments: Any, **options: Any) -> Any:
    """Any operator on npu tensors without a dedicated implementation in `install`."""
    schema = operator._schema
    counts[operator.name()] += 1
    if schema.name == "aten::set_" or any(one.alias_info and not one.alias_info.is_write for one in schema.returns):
        return operator.redispatch(_CPU, *arguments, **options)
    loan = _Loan(schema.name)
    results = {one.name: options.pop(one.name) for one in schema.arguments if one.is_out and one.name in options}
    here = loan.take(arguments)
    there = {name: loan.take(value) for name, value in options.items()}
    loan.check()
    if not results:
        return loan.give_back(_drawn(operator, here, there))
    fresh = {name: torch.empty(0, dtype=result.dtype) for name, result in results.items()}
    loan.lent += [(result, fresh[name]) for name, result in results.items()]
    made = _drawn(operator, here, there | fresh)
    for name, result in results.items():
        if result.shape != fresh[name].shape:
            result.resize_(fresh[name].shape)
        on_host(result).copy_(fresh[name])
    return loan.give_back(made)


def _drawn(operator: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Run the operator; random ones use the device's generator."""
    names = [one.name for one in operator._schema.arguments]
    if "generator" in names:
        return operator(*arguments[: names.index("generator")], **{**options, "generator": device.next_draw()})
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return operator(*arguments, **options)
    kept = torch.get_rng_state()
    torch.set_rng_state(device.next_draw().get_state())
    try:
        return operator(*arguments, **options)
    finally:
        torch.set_rng_state(kept)


def _empty(size: Sequence[int], *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None) -> Tensor:
    _check(device)
    return on_device(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(
    size: Sequence[int], stride: Sequence[int], *, dtype=None, layout=None, device=None, pin_memory=None
) -> Tensor:
    _check(device)
    return on_device(torch.empty_strided(size, stride, dtype=dtype))


def _empty_like(like: Tensor, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None) -> Tensor:
    """Also for host memory, which is never pinned here."""
    made = torch.empty_like(on_host(like), dtype=dtype, memory_format=memory_format or torch.preserve_format)
    return made if device is not None and device.type == "cpu" else on_device(made)


def _check(which: torch.device | None) -> None:
    device.index(which)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    counts["aten::_copy_from"] += 1
    on_host(target).copy_(on_host(source))
    return target


def _to_copy(
    tensor: Tensor, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None
) -> Tensor:
    """Ignores `non_blocking`, which would need pinned memory."""
    counts["aten::_to_copy"] += 1
    copy = on_host(tensor).to(dtype=dtype or tensor.dtype, copy=True, memory_format=memory_format or torch.preserve_format)
    return on_device(copy) if (device or tensor.device).type == "npu" else copy


def _resize(tensor: Tensor, size: Sequence[int], *, memory_format=None) -> Tensor:
    """Allocates new bytes if the old ones are too few."""
    needed = torch.Size(size).numel() * tensor.element_size()
    if needed <= tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size():
        return tensor.as_strided_(size, torch.empty(size, device="meta").stride())
    new = _empty(size, dtype=tensor.dtype)
    return aten.set_.source_Storage_storage_offset.redispatch(_CPU, tensor, new.untyped_storage(), 0, size, new.stride())


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
) -> Tensor:
    """As elementary operators, so that it has a backward pass."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _convolution(*arguments: Any) -> Tensor:
    return _lent("convolution", aten.convolution, *arguments)


def _convolution_backward(above: Tensor, states: Tensor, weight: Tensor, *rest: Any) -> Sequence[Tensor]:
    """There is never a bias: it is added separately."""
    return _lent("convolution_backward", aten.convolution_backward, above, states, weight, None, *rest)


def _lent(name: str, operator: Any, *arguments: Any) -> Any:
    counts[f"aten::{name}"] += 1
    loan = _Loan(f"aten::{name}")
    here = loan.take(arguments)
    loan.check()
    return loan.give_back(operator(*here))


def _autocast(name: str, choose: Callable[[], torch.dtype]) -> Callable[..., Any]:
    """The operator with arguments cast to the autocast dtype."""
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(aten, packet), overload or "default")

    def cast(argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return type(argument)(cast(each) for each in argument)
        floating = isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64
        return argument.to(choose()) if floating else argument

    def run(*arguments: Any, **options: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return operator(*cast(arguments), **{key: cast(value) for key, value in options.items()})

    return run


def install() -> None:
    everything, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend((everything, some))
    everything.fallback(_fallback, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    own: dict[str, Callable[..., Any]] = {
        "empty.memory_format": _empty, "empty_strided": _empty_strided, "empty_like": _empty_like, "resize_": _resize,
        "_copy_from": _copy_from, "_to_copy": _to_copy, "scaled_dot_product_attention": _attention,
        "_has_compatible_shallow_copy_type": lambda one, other: {one.device.type, other.device.type} <= {"cpu", "npu"},
        "record_stream": lambda *_: None, "convolution_overrideable": _convolution,
        "convolution_backward_overrideable": _convolution_backward,
    }  # fmt: skip
    for name, kernel in own.items():
        some.impl(name, kernel, "PrivateUse1")
    some.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    some.impl("_pin_memory", lambda tensor, device=None: tensor, "CPU")
    for names, choose in (
        (_IN_LOW_PRECISION, lambda: torch.get_autocast_dtype("npu")), (_IN_FLOAT32, lambda: torch.float32),
    ):  # fmt: skip
        for name in names:
            some.impl(name, _autocast(name, choose), "AutocastPrivateUse1")
