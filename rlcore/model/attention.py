"""Prefix-shared attention over a packed row: in plain torch (the reference), or by a device's kernel for ragged sequences.

Registered with transformers under `NAME`; a model called with `segments=` reaches it through its attention interface.

Plain torch computes spans (prompts, responses) of similar shape together, one tile at a time, each over its prompt's keys and
its own. Backward recomputes a tile's scores (FlashAttention-2, arXiv 2307.08691), so that none outlives its tile. A tile's
scores take at most `TILE_BYTES`, long spans being cut to fit; its padding is bounded by `MAX_PADDING`. A kernel gets every
prompt and response as one sequence; a response's keys follow those of its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from rlcore.distributed.ulysses import over_slices
from rlcore.types import Segment

NAME = "rlcore_packed"
_FEWEST = 16  # minimum queries per stretch, however many keys there are
MAX_PADDING = 1.5  # maximum of a tile's padded area / used area
TILE_BYTES = 2 * 2**20  # scores per tile: with their intermediates they stay in the CPU cache


@dataclass(frozen=True)
class Span:
    """One prompt or response: its queries, and the prompt keys they attend to besides their own."""

    start: int
    length: int
    prefix_start: int
    prefix: int

    @property
    def own(self) -> range:
        """Indices of its queries in the row."""
        return range(self.start, self.start + self.length)


@dataclass(frozen=True)
class Ragged:
    """B spans for one kernel call. Their concatenated queries are the row itself."""

    keys: Tensor  # [S] int64: row indices of each span's keys, its prefix first
    query_starts: Tensor  # [B + 1] int32: start of each span's queries, then the end of the last
    key_starts: Tensor  # [B + 1] int32
    query_lengths: tuple[int, ...]  # [B], on the host: no device synchronization
    key_lengths: tuple[int, ...]


Kernel = Callable[[Tensor, Tensor, Tensor, Ragged, float], Tensor]
"""Queries [T, H, D], keys and values [S, K, D], spans and scale -> [T, H, D]. Causal, aligned at the end: a span's last query
sees all its keys, the one before it all but the last, and so on; H is a multiple of K."""


@dataclass(frozen=True)
class Stretch:
    """Adjacent queries of a span, with the keys they attend to: all of the prompt's, and causally the span's own up to the last
    query."""

    queries: range
    prefix: range
    own: range


@dataclass(frozen=True)
class Tile:
    """B stretches of up to Q queries and N keys, computed by batched matrix products. Index T of the row is padding."""

    queries: Tensor  # [B * K * Q] int64: row index * K + key head
    keys: Tensor  # [B * K * N] int64, prompt keys first
    unseen: Tensor  # [B or 1, 1, Q, 1, n] bool: mask of the last n keys for each query; all earlier keys are visible
    products: int  # B * K


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, segments: Sequence[Segment],
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]. Prompt tokens attend causally to their prompt, response
    tokens to their whole prompt and causally to their own response. H is a multiple of K. In the dtype of the values."""
    query, key, value = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))  # [T, heads, D]
    tiles = layout(tuple(segments), query.shape[1], key.shape[1], query.device)
    return _PackedAttention.apply(query, key, value, tiles, scaling or query.shape[-1] ** -0.5)[None], None


class _PackedAttention(torch.autograd.Function):
    """Rows in the code are [(T + 1) * K, share * D]: each token's heads grouped by their key head, and a zero token for
    padding."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: Sequence[Tile], scale: float) -> Tensor:
        """query [T, H, D], key and value [T, K, D] -> [T, H, D]."""
        (places, _, width), heads = query.shape, key.shape[1]
        queries, keys, values = (_rows(states, heads) for states in (query, key, value))
        output = torch.empty_like(queries)
        for tile in tiles:
            odds = _odds(tile, _chosen(queries, tile.queries, tile, width), _chosen(keys, tile.keys, tile, width), scale)
            seen = torch.bmm(odds.to(values.dtype), _chosen(values, tile.keys, tile, width))
            output.index_copy_(0, tile.queries, seen.view(len(tile.queries), -1))
        result = output[:-heads].view(places, -1, width)
        ctx.save_for_backward(query, key, value, result)
        ctx.tiles, ctx.scale = tiles, scale
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (query, key, value, output) = grad_outputs, ctx.saved_tensors
        (places, _, width), heads, wide = output.shape, key.shape[1], _wide(output)
        inner = torch.linalg.vecdot(gradient.to(wide), output.to(wide))[..., None]  # [T, H, 1]
        queries, keys, values, upstream, inner = (_rows(states, heads) for states in (query, key, value, gradient, inner))
        of_query = torch.empty_like(queries)
        of_key, of_value = (torch.zeros_like(rows, dtype=wide) for rows in (keys, values))
        for tile in ctx.tiles:
            asking, above = (_chosen(rows, tile.queries, tile, width) for rows in (queries, upstream))
            asked, given = (_chosen(rows, tile.keys, tile, width) for rows in (keys, values))
            odds = _odds(tile, asking, asked, ctx.scale)
            slope = torch.bmm(above, given.transpose(1, 2)).to(wide).sub_(_chosen(inner, tile.queries, tile, 1)).mul_(odds)
            slope = slope.mul_(ctx.scale).to(value.dtype)
            of_query.index_copy_(0, tile.queries, torch.bmm(slope, asked).view(len(tile.queries), -1))
            _add(of_key, tile.keys, torch.bmm(slope.transpose(1, 2), asking))
            _add(of_value, tile.keys, torch.bmm(odds.to(value.dtype).transpose(1, 2), above))
        gradients = (rows[:-heads].to(value.dtype).view(places, -1, width) for rows in (of_query, of_key, of_value))
        return *gradients, None, None


def _rows(states: Tensor, heads: int) -> Tensor:
    """[T, heads x share, D] -> [(T + 1) * heads, share * D], with a zero token appended."""
    return torch.cat([states, torch.zeros_like(states[:1])]).view((len(states) + 1) * heads, -1)


def _chosen(rows: Tensor, places: Tensor, tile: Tile, width: int) -> Tensor:
    """Gather rows: [products, Q x share or N, width]."""
    return rows.index_select(0, places).view(tile.products, -1, width)


def _odds(tile: Tile, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[products, Q * share, D], [products, N, D] -> [products, Q * share, N] in float32 at least: attention probabilities."""
    wide, batch, places = _wide(queries), len(tile.unseen), len(tile.queries) // tile.products
    queries, keys = queries.to(wide), keys.to(wide)
    scores = torch.baddbmm(queries.new_zeros(()), queries, keys.transpose(1, 2), beta=0, alpha=scale)
    each = scores.view(batch, tile.products // batch, places, -1, scores.shape[2])
    each[..., scores.shape[2] - tile.unseen.shape[-1] :].masked_fill_(tile.unseen, -torch.inf)
    return scores.softmax(-1)


def _add(sums: Tensor, places: Tensor, product: Tensor) -> None:
    sums.index_add_(0, places, product.view(len(places), -1).to(sums.dtype))


def _wide(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


@lru_cache(maxsize=4)  # shared by the layers of a forward pass
def layout(segments: tuple[Segment, ...], heads: int, key_heads: int, device: torch.device) -> list[Tile]:
    """Tile a packed row; every token is a query exactly once."""
    most = TILE_BYTES // (4 * heads)  # scores per head in a tile
    stretches = [stretch for kind in _spans(segments) for span in kind for stretch in _stretches(span, most)]
    places = sum(segment.tokens for segment in segments)
    return [_tile(run, places, key_heads, device) for alike in _alike(stretches) for run in _limited(alike, most)]


def _stretches(span: Span, most: int) -> Iterator[Stretch]:
    """Cut a span into as few stretches as a tile's score budget allows."""
    size = max(_FEWEST, min(span.length, most // (span.prefix + span.length)))
    for first in range(0, span.length, size):
        end, prefix = span.start + min(first + size, span.length), range(span.prefix_start, span.prefix_start + span.prefix)
        yield Stretch(range(span.start + first, end), prefix, range(span.start, end))


def _alike(stretches: Sequence[Stretch]) -> list[list[Stretch]]:
    """Group stretches into runs of similar shape, most queries first; `MAX_PADDING` bounds the padding of a run's tile."""
    runs: list[list[Stretch]] = []
    used = 0
    for stretch in sorted(stretches, key=lambda one: (-len(one.queries), -len(one.prefix), -len(one.own))):
        if runs and _area(run := [*runs[-1], stretch]) <= MAX_PADDING * (used + _area([stretch])):
            runs[-1] = run
            used += _area([stretch])
        else:
            runs.append([stretch])
            used = _area([stretch])
    return runs


def _area(run: Sequence[Stretch]) -> int:
    """Scores per head of a run's tile, padding included."""
    queries, prefix, own = (max(map(len, ranges)) for ranges in _ranges(run))
    return len(run) * queries * (prefix + own)


def _ranges(run: Sequence[Stretch]) -> tuple[Sequence[range], ...]:
    """Ranges of a run's queries, prompt keys and own keys."""
    return tuple(zip(*((one.queries, one.prefix, one.own) for one in run), strict=True))


def _limited(run: Sequence[Stretch], most: int) -> Iterator[Sequence[Stretch]]:
    """Split a run into pieces that fit in a tile."""
    size = max(1, most * len(run) // _area(run))
    return (run[first : first + size] for first in range(0, len(run), size))


def _tile(run: Sequence[Stretch], places: int, key_heads: int, device: torch.device) -> Tile:
    """Build the tile of a run; `places` is the row's token count."""
    queries, prefix, own = (_places(ranges, places) for ranges in _ranges(run))
    unseen = _unseen(run, queries.shape[1], prefix.shape[1], own.shape[1])
    heads = torch.arange(key_heads)[:, None]
    rows = ((each[:, None, :] * key_heads + heads).flatten() for each in (queries, torch.cat([prefix, own], dim=1)))
    queries, keys, unseen = (each.to(device) for each in (*rows, unseen))
    return Tile(queries, keys, unseen, len(run) * key_heads)


def _places(ranges: Sequence[range], padding: int) -> Tensor:
    """[B, L] int64: each range, padded to the longest."""
    longest = torch.arange(max(map(len, ranges)))
    starts, lengths = (torch.tensor(each)[:, None] for each in ([one.start for one in ranges], [len(one) for one in ranges]))
    return torch.where(longest < lengths, starts + longest, padding)


def _unseen(run: Sequence[Stretch], queries: int, prefix: int, own: int) -> Tensor:
    """[B or 1, 1, Q, 1, n] mask: own keys after the query, and the padding of prompt keys if there is any."""
    prefixes, ahead = (torch.tensor(each)[:, None, None] for each in zip(*map(_seen, run), strict=True))
    if len(set(map(_seen, run))) == 1:
        prefixes, ahead = prefixes[:1], ahead[:1]
    behind = torch.arange(own) > ahead + torch.arange(queries)[:, None]
    padding = torch.arange(prefix) >= prefixes
    unseen = torch.cat([padding.expand(-1, queries, -1), behind], dim=2) if padding.any() else behind
    return unseen[:, None, :, None, :]


def _seen(stretch: Stretch) -> tuple[int, int]:
    """Numbers of visible keys: of the prompt, and of the own span before the first query."""
    return len(stretch.prefix), len(stretch.own) - len(stretch.queries)


def use(kernel: Kernel, dtypes: Collection[torch.dtype]) -> None:
    """Route this process's attention in these dtypes to the kernel from now on."""

    def attention(module: nn.Module, query: Tensor, *states: Any, **options: Any) -> tuple[Tensor, None]:
        chosen = partial(ragged_attention, kernel) if states[1].dtype in dtypes else packed_attention
        return chosen(module, query, *states, **options)

    AttentionInterface.register(NAME, over_slices(attention))


def ragged_attention(
    kernel: Kernel, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *,
    segments: Sequence[Segment], scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:
    """`packed_attention`, computed by a kernel."""
    spans = ragged(tuple(segments), query.device)
    query, key, value = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))  # [T, heads, D]
    key, value = (tensor.index_select(0, spans.keys) for tensor in (key, value))
    return kernel(query, key, value, spans, scaling or query.shape[-1] ** -0.5)[None], None


@lru_cache(maxsize=4)  # shared by the layers of a forward pass
def ragged(segments: tuple[Segment, ...], device: torch.device) -> Ragged:
    """Spans of a packed row, in row order."""
    spans = sorted((span for kind in _spans(segments) for span in kind), key=lambda span: span.start)
    keys = [place for span in spans for place in (*range(span.prefix_start, span.prefix_start + span.prefix), *span.own)]
    lengths = tuple(span.length for span in spans), tuple(span.prefix + span.length for span in spans)
    queries, seen = (torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device) for each in lengths)
    return Ragged(torch.tensor(keys, device=device), queries, seen, *lengths)


def _spans(segments: Sequence[Segment]) -> tuple[list[Span], list[Span]]:
    """Spans of the prompts, and spans of the responses."""
    prompts = [Span(segment.start, segment.prompt, segment.start, 0) for segment in segments]
    responses = [
        Span(start, end - start, segment.start, segment.prompt)
        for segment in segments
        for start, end in pairwise(_starts(segment))
        if end > start
    ]
    return prompts, responses


def _starts(segment: Segment) -> list[int]:
    """Start of each response, then the end of the last."""
    starts = [segment.start + segment.prompt]
    for length in segment.responses:
        starts.append(starts[-1] + length)
    return starts


AttentionInterface.register(NAME, over_slices(packed_attention))
