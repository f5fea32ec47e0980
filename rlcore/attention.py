"""Prefix-shared attention over a packed row: in plain torch, the yardstick, or by a device's kernel for ragged sequences.

Registered with transformers under `NAME`; a model called with `segments=` reaches it through its attention interface.
In plain torch, queries that share a shape are gathered into rectangles (prompts with prompts, responses with responses), so
that a row of many short segments costs a few large calls; padding inside a rectangle is masked and bounded by `MAX_PADDING`.
A kernel is given every prompt and response as a sequence, with the keys of its prompt before those of a response.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rlcore.packing import Segment
from rlcore.sequence_parallel import over_slices

NAME = "rlcore_packed"
MAX_PADDING = 1.5  # a rectangle's area over the area in use


@dataclass(frozen=True)
class Span:
    """One prompt or response: its queries, and the prompt keys they see besides themselves."""

    start: int
    length: int
    prefix_start: int
    prefix: int

    @property
    def own(self) -> range:
        """Places of its queries in the row."""
        return range(self.start, self.start + self.length)


@dataclass(frozen=True)
class Ragged:
    """B spans as one call of a kernel. Their queries, one span after the other, are the row itself."""

    keys: Tensor  # [S] int64: places in the row of what each span sees, its prefix first
    query_starts: Tensor  # [B + 1] int32: where each span's queries start, and where the last end
    key_starts: Tensor  # [B + 1] int32
    query_lengths: tuple[int, ...]  # [B], known without a look at the device
    key_lengths: tuple[int, ...]


Kernel = Callable[[Tensor, Tensor, Tensor, Ragged, float], Tensor]
"""Queries [T, H, D], keys and values [S, K, D], spans and scale -> [T, H, D]. The last query of a span sees all its keys, the
one before it all but the last, and so on; H is a multiple of K."""


@dataclass(frozen=True)
class Rectangle:
    """B spans as one attention call."""

    spans: int  # B
    queries: Tensor  # [B * Q] int64, places in the row; padding repeats the first
    keys: Tensor  # [B * K]
    mask: Tensor | None  # [B, 1, Q, K], added to scores: 0 where a query sees a key, else -inf; None: those up to its own place
    used: Tensor  # places of [B * Q] that are no padding
    targets: Tensor  # where those belong in the row


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, segments: Sequence[Segment],
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:
    """[1, H, T, D] x 2 [1, K, T, D] -> [1, T, H, D]. Prompt tokens attend causally to their prompt, response tokens to
    their whole prompt and causally to their own response. H is a multiple of K."""
    query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))  # [T, heads, D]
    outputs, targets = [], []
    for rectangle in layout(tuple(segments), query.device, _dtype(query)):
        spans = rectangle.spans
        attended = scaled_dot_product_attention(
            _gather(query, rectangle.queries, spans), _gather(key, rectangle.keys, spans),
            _gather(value, rectangle.keys, spans), attn_mask=rectangle.mask, is_causal=rectangle.mask is None, scale=scaling,
            enable_gqa=True,
        )
        flat = attended.transpose(1, 2).reshape(len(rectangle.queries), *query.shape[1:])
        outputs.append(flat.index_select(0, rectangle.used))
        targets.append(rectangle.targets)
    place = torch.cat(targets).argsort()
    return torch.cat(outputs).index_select(0, place)[None], None


def use(kernel: Kernel, dtypes: Collection[torch.dtype]) -> None:
    """From now on this process's rows in these dtypes go to the kernel."""

    def attention(module: nn.Module, query: Tensor, *states: Any, **options: Any) -> tuple[Tensor, None]:
        chosen = partial(ragged_attention, kernel) if _dtype(query) in dtypes else packed_attention
        return chosen(module, query, *states, **options)

    AttentionInterface.register(NAME, over_slices(attention))


def ragged_attention(
    kernel: Kernel, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *,
    segments: Sequence[Segment], scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:
    """`packed_attention` by a kernel."""
    spans, dtype = ragged(tuple(segments), query.device), _dtype(query)
    query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))  # [T, heads, D]
    key, value = (tensor.index_select(0, spans.keys) for tensor in (key, value))
    return kernel(query, key, value, spans, scaling or query.shape[-1] ** -0.5)[None], None


@lru_cache(maxsize=4)  # for the layers of a pass
def ragged(segments: tuple[Segment, ...], device: torch.device) -> Ragged:
    """The spans of a packed row, in its order."""
    spans = sorted((span for kind in _spans(segments) for span in kind), key=lambda span: span.start)
    keys = [place for span in spans for place in (*range(span.prefix_start, span.prefix_start + span.prefix), *span.own)]
    lengths = tuple(span.length for span in spans), tuple(span.prefix + span.length for span in spans)
    starts = [torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device) for each in lengths]
    return Ragged(torch.tensor(keys, device=device), *starts, *lengths)


@lru_cache(maxsize=4)  # for the layers of a pass: masks grow with the square of a row, and are made in milliseconds
def layout(segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype) -> list[Rectangle]:
    """The rectangles of a packed row: every one of its tokens is a query exactly once."""
    return [_rectangle(spans, device, dtype) for kind in _spans(segments) for spans in _alike(kind)]


def _spans(segments: Sequence[Segment]) -> tuple[list[Span], list[Span]]:
    """Prompts, and responses."""
    prompts = [Span(segment.start, segment.prompt, segment.start, 0) for segment in segments]
    responses = [
        Span(start, end - start, segment.start, segment.prompt)
        for segment in segments
        for start, end in pairwise(_starts(segment))
        if end > start
    ]
    return prompts, responses


def _dtype(query: Tensor) -> torch.dtype:
    """The one that attention computes in. A mask in another would be converted, and kept, by every layer."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _gather(tensor: Tensor, places: Tensor, spans: int) -> Tensor:
    """[T, heads, D] -> [B, heads, L, D]."""
    return tensor.index_select(0, places).view(spans, -1, *tensor.shape[1:]).transpose(1, 2)


def _starts(segment: Segment) -> list[int]:
    """Where each response starts, and where the last ends."""
    starts = [segment.start + segment.prompt]
    for length in segment.responses:
        starts.append(starts[-1] + length)
    return starts


def _alike(spans: list[Span]) -> list[list[Span]]:
    """The spans, longest first, in runs whose rectangle is not much larger than what is in it."""
    runs: list[list[Span]] = []
    used = 0
    for span in sorted(spans, key=lambda span: (-span.length, -span.prefix)):
        area = span.length * (span.prefix + span.length)
        if runs:
            run = [*runs[-1], span]
            rectangle = len(run) * _longest(run, lambda s: s.length) * _longest(run, lambda s: s.prefix + s.length)
            if rectangle <= MAX_PADDING * (used + area):
                runs[-1] = run
                used += area
                continue
        runs.append([span])
        used = area
    return runs


def _longest(spans: Sequence[Span], size: Callable[[Span], int]) -> int:
    return max(map(size, spans))


def _rectangle(spans: Sequence[Span], device: torch.device, dtype: torch.dtype) -> Rectangle:
    queries = _longest(spans, lambda span: span.length)
    prefix = _longest(spans, lambda span: span.prefix)
    numbers = torch.tensor([(span.start, span.length, span.prefix_start, span.prefix) for span in spans])
    start, length, prefix_start, prefixes = numbers.T[..., None]
    own, shared = torch.arange(queries), torch.arange(prefix)
    query_places = torch.where(own < length, start + own, start)
    key_places = torch.cat([torch.where(shared < prefixes, prefix_start + shared, start), query_places], dim=1)
    used = (own < length).flatten().nonzero()[:, 0]
    places = (query_places.flatten(), key_places.flatten(), used, query_places.flatten()[used])
    query_places, key_places, used, targets = (each.to(device) for each in places)
    mask = _mask(prefixes, prefix, queries).to(device, dtype) if prefix else None
    return Rectangle(len(spans), query_places, key_places, mask, used, targets)


def _mask(prefixes: Tensor, prefix: int, queries: int) -> Tensor:
    """[B, 1, Q, prefix + Q] for prefixes [B, 1] of up to `prefix` tokens."""
    sees_prefix = (torch.arange(prefix) < prefixes)[:, None, :].expand(-1, queries, -1)
    sees_own = torch.ones(queries, queries, dtype=torch.bool).tril().expand(len(prefixes), -1, -1)
    seen = torch.cat([sees_prefix, sees_own], dim=2)[:, None]
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


AttentionInterface.register(NAME, over_slices(packed_attention))
