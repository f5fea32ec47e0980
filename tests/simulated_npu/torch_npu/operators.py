"""torch_npu's own operators that rlcore calls, with the schemas of torch_npu 2.10.0.post4.

Each is its formula in float64, rounded once to the dtype of its first argument, with the formula's gradients. Arguments that
only the real one supports, or that it would misinterpret, are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .dispatch import DeviceMismatch, counts, on_device, on_host

_SCHEMAS = (
    "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    "npu_swiglu(Tensor input, int dim=-1) -> Tensor",
    "npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) -> Tensor",
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None, "
    "Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., int pre_tockens=2147483647, "
    "int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, int[]? actual_seq_qlen=None, "
    "int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False, str softmax_layout=\"\", "
    "Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, int offset=0) "
    "-> (Tensor, Tensor, Tensor, Tensor, int, int, int)",
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_SEQUENCES, _SIDE, _CAUSAL_TO_THE_LAST_KEY = 1024, 2048, 3
_libraries: list[torch.library.Library] = []


class _Exact(torch.autograd.Function):
    """formula(*tensors), hiding its inner operators from dispatch modes."""

    @staticmethod
    def forward(ctx: Any, formula: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.formula = formula
        ctx.save_for_backward(*tensors)
        with _disable_current_modes():
            return on_device(formula(*map(_wide, tensors)).to(tensors[0].dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with _disable_current_modes(), torch.enable_grad():
            inputs = [_wide(tensor).requires_grad_() for tensor in ctx.saved_tensors]
            gradients = torch.autograd.grad(ctx.formula(*inputs), inputs, _wide(gradient))
            return None, *(on_device(one.to(like.dtype)) for one, like in zip(gradients, ctx.saved_tensors, strict=True))


def _wide(tensor: Tensor) -> Tensor:
    return on_host(tensor.detach()).double()


def _unread(*shape: int) -> Tensor:
    """Placeholder for the tensors that the real one saves for backward."""
    return on_device(torch.full(shape, torch.nan))


def _rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    _need(2 <= input.dim() <= 8, f"input has {input.dim()} dimensions, not 2 to 8")
    _need(input.shape[-1:] == gamma.shape, f"gamma is {list(gamma.shape)}, the last dimension of input {input.shape[-1]}")

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * weight / torch.sqrt(length**2 / x.shape[-1] + epsilon)

    return _Exact.apply(formula, input, gamma), _unread(*input.shape[:-1], 1)


def _swiglu(input: Tensor, dim: int) -> Tensor:
    _need(input.shape[dim] % 2 == 0, f"dimension {dim} of input is {input.shape[dim]}, which is odd")

    def formula(both: Tensor) -> Tensor:
        gate, up = both.tensor_split(2, dim)
        return gate * up / (1 + torch.exp(-gate))

    return _Exact.apply(formula, input)


def _rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str) -> Tensor:
    size = input.shape[-1]
    _need(rotary_mode == "half", f"rotary_mode is {rotary_mode!r}; the simulated one knows 'half'")
    _need(input.dim() == r1.dim() == 4 and r1.shape == r2.shape, "input, r1 and r2 must have 4 dimensions, r1 and r2 one shape")
    _need(size % 2 == 0 and size < 896 and r1.shape[-1] == size, f"input has {size} numbers a head, r1 {r1.shape[-1]}")
    alike = all(angle in (1, whole) for angle, whole in zip(r1.shape, input.shape, strict=True))
    _need(alike and max(input.shape[:2]) < 1000, f"r1 {list(r1.shape)} does not fit input {list(input.shape)}")

    def formula(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        left, right = x[..., : size // 2], x[..., size // 2 :]
        across = sine[..., : size // 2] * right, sine[..., size // 2 :] * left
        return torch.cat([cosine[..., : size // 2] * left - across[0], cosine[..., size // 2 :] * right + across[1]], dim=-1)

    return _Exact.apply(formula, input, r1, r2)


def _fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, atten_mask: Tensor | None, scale: float,
    actual_seq_qlen: Sequence[int] | None, actual_seq_kvlen: Sequence[int] | None, sparse_mode: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    _need(input_layout == "TND", f"input_layout is {input_layout!r}; the simulated one knows 'TND'")
    _need(query.dim() == key.dim() == 3 and key.shape == value.shape, "query, key and value must be [tokens, heads, numbers]")
    _need(head_num == query.shape[1] and head_num % key.shape[1] == 0 and query.shape[2] == key.shape[2],
          f"query {list(query.shape)}, key {list(key.shape)}, head_num {head_num}")  # fmt: skip
    _need(sparse_mode == _CAUSAL_TO_THE_LAST_KEY, f"sparse_mode is {sparse_mode}; the simulated one knows 3")
    _need(atten_mask is not None and atten_mask.dtype in (torch.bool, torch.uint8) and atten_mask.shape == (_SIDE, _SIDE),
          "sparse_mode 3 needs a mask of bools [2048, 2048]")  # fmt: skip
    mask = on_host(atten_mask)
    _need(mask.equal(torch.ones_like(mask).triu(1)), "the mask is not true above its diagonal alone")
    _need(actual_seq_qlen is not None and actual_seq_kvlen is not None, "TND needs actual_seq_qlen and actual_seq_kvlen")
    own, seen = ([*pairwise([0, *ends])] for ends in (actual_seq_qlen, actual_seq_kvlen))
    _need(0 < len(own) == len(seen) <= _MOST_SEQUENCES, f"{len(own)} and {len(seen)} sequences, of at most {_MOST_SEQUENCES}")
    _need(own[-1][1] == len(query) and seen[-1][1] == len(key),
          f"queries end at {own[-1][1]} of {len(query)}, keys at {seen[-1][1]} of {len(key)}")  # fmt: skip
    sizes = [(right - left, last - first) for (left, right), (first, last) in zip(own, seen, strict=True)]
    _need(all(0 <= queries <= keys for queries, keys in sizes), f"a sequence has fewer keys than queries: {sizes}")

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.unflatten(1, (k.shape[1], -1))  # [T, K, H / K, D]
        parts = [
            _causal(grouped[left:right], k[first:last], v[first:last], scale)
            for (left, right), (first, last) in zip(own, seen, strict=True)
        ]
        return torch.cat(parts).flatten(1, 2)

    kept = [_unread(len(query), head_num, 8) for _ in range(2)]
    return _Exact.apply(formula, query, key, value), *kept, _unread(0), 0, 0, 0


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[Q, K, H / K, D], [S, K, D] twice -> [Q, K, H / K, D]: the n-th query from the end sees all but the last n keys."""
    scores = (query[:, None] * key[None, :, :, None]).sum(-1) * scale  # [Q, S, K, H / K]
    places = torch.arange(len(key)) - (len(key) - len(query))
    hidden = (places > torch.arange(len(query))[:, None])[..., None, None]
    weights = torch.exp(scores.masked_fill(hidden, -math.inf) - scores.detach().amax(1, keepdim=True))
    return ((weights / weights.sum(1, keepdim=True))[..., None] * value[None, :, :, None]).sum(1)


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise RuntimeError(otherwise)


def _operator(schema: str, kernel: Callable[..., Any], library: torch.library.Library) -> None:
    """Arguments that the kernel does not support must have their default values."""
    name = library.define(schema)
    arguments = getattr(torch.ops.npu, name).default._schema.arguments
    known = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]

    def run(*given: Any) -> Any:
        values = {one.name: given[place] if place < len(given) else one.default_value for place, one in enumerate(arguments)}
        _check(name, {one: value for one, value in values.items() if isinstance(value, Tensor)})
        for one in arguments:
            if one.name not in known and values[one.name] != one.default_value:
                raise NotImplementedError(f"npu::{name}: the simulated one knows no {one.name}")
        counts[f"npu::{name}"] += 1
        return kernel(**{one: values[one] for one in known})

    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl(name, run, key)


def _check(name: str, tensors: dict[str, Tensor]) -> None:
    if any(tensor.device.type != "npu" for tensor in tensors.values()):
        raise DeviceMismatch(f"npu::{name}: {', '.join(f'{one} on {tensor.device}' for one, tensor in tensors.items())}")
    dtypes = {tensor.dtype for one, tensor in tensors.items() if one != "atten_mask"}
    if len(dtypes) > 1 or not dtypes <= {*_DTYPES}:
        raise RuntimeError(f"npu::{name}: {', '.join(f'{one} is {tensor.dtype}' for one, tensor in tensors.items())}")


def install() -> None:
    library = torch.library.Library("npu", "DEF")
    _libraries.append(library)
    for schema, kernel in zip(_SCHEMAS, (_rms_norm, _swiglu, _rotary_mul, _fusion_attention), strict=True):
        _operator(schema, kernel, library)
