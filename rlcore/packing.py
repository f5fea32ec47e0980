"""Groups -> packed rows under a hard token cap, each prompt once.

A packed row holds, for each group, the prompt and then its responses; positions restart after the prompt for each
response, and each response attends to its prompt and itself (`attention.py`). A response's last token predicts nothing,
so it is a target but never an input. Prefix sharing in training: PrefixGrouper (arXiv 2506.05433).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlcore.errors import ConfigError
from rlcore.types import Batch, Vision


@dataclass(frozen=True)
class Segment:
    """Where one group lies in a packed row: `prompt` tokens from `start`, then each response's input tokens."""

    start: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.responses)


@dataclass(frozen=True)
class Packed:
    """One forward pass. M targets: the response tokens whose log-probabilities it gives."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, or [3, T] where the family has multi-axis positions
    segments: tuple[Segment, ...]
    sources: Tensor  # [M] int64, the place in T whose hidden state predicts the target
    targets: Tensor  # [M] int64
    index: Tensor  # [M] int64, where the target stands in the batch's [N]
    vision: Sequence[Vision]  # one a group that has images, in row order

    @property
    def tokens(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Piece:
    """Some samples of one group; a group larger than the cap becomes several, each with the prompt."""

    group: int
    samples: tuple[int, ...]
    tokens: int


def plan(
    groups: Sequence[tuple[int, Sequence[int]]], cap: int, names: Sequence[str] | None = None, whole_groups: bool = False
) -> list[list[Piece]]:
    """Micro-batches for groups of (prompt tokens, response tokens of each sample), none above `cap` forwarded tokens.

    As few as first-fit-decreasing finds, then spread evenly over that many where the cap allows.
    ConfigError names a sample that exceeds the cap by itself, or a group where it must stay whole.
    """
    pieces = [piece for index, group in enumerate(groups) for piece in _split(index, *group, cap, names)]
    if whole_groups:
        _check_whole(pieces, groups, cap, names)
    pieces.sort(key=lambda piece: -piece.tokens)
    packed = _first_fit(pieces, cap)
    even = _spread(pieces, len(packed))
    bins = even if all(_size(pieces) <= cap for pieces in even) else packed
    return [sorted(pieces, key=lambda piece: (piece.group, piece.samples)) for pieces in bins]


def over_ranks(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which groups each rank takes, in order: the largest first, each to the rank with the fewest tokens so far.

    No rank has more than the mean and one group's tokens.
    """
    shares = _spread([Piece(group, (), size) for group, size in sorted(enumerate(sizes), key=lambda each: -each[1])], ranks)
    return [sorted(piece.group for piece in share) for share in shares]


def pack(batch: Batch, pieces: Sequence[Piece]) -> Packed:
    """The pieces as one row."""
    ends = batch.lengths.cumsum(0).tolist()
    first_sample, total = [], 0
    for group in batch.groups:
        first_sample.append(total)
        total += len(group.samples)
    input_ids: list[int] = []
    position_ids: list[Tensor] = []
    sources: list[Tensor] = []
    targets: list[int] = []
    index: list[Tensor] = []
    segments: list[Segment] = []
    vision: list[Vision] = []
    axes = max((_axes(batch.groups[piece.group].prompt.position_ids) for piece in pieces), default=1)
    for piece in pieces:
        prompt = batch.groups[piece.group].prompt
        start = len(input_ids)
        input_ids += prompt.token_ids
        length = len(prompt.token_ids)
        position_ids.append(_positions(prompt.position_ids, length, axes))
        if prompt.vision is not None:
            vision.append(prompt.vision)
        responses = []
        for sample_index in piece.samples:
            tokens = batch.groups[piece.group].samples[sample_index].token_ids
            end = ends[first_sample[piece.group] + sample_index]
            here = len(input_ids)
            sources.append(torch.tensor([start + length - 1, *range(here, here + len(tokens) - 1)]))
            position_ids.append(torch.arange(prompt.next_position, prompt.next_position + len(tokens) - 1).expand(axes, -1))
            input_ids += tokens[:-1]
            targets += tokens
            index.append(torch.arange(end - len(tokens), end))
            responses.append(len(tokens) - 1)
        segments.append(Segment(start, length, tuple(responses)))
    positions = torch.cat(position_ids, dim=1)
    return Packed(
        input_ids=torch.tensor(input_ids),
        position_ids=positions[0] if axes == 1 else positions,
        segments=tuple(segments),
        sources=torch.cat(sources),
        targets=torch.tensor(targets),
        index=torch.cat(index),
        vision=vision,
    )


def microbatches(batch: Batch, cap: int, whole_groups: bool = False) -> list[Packed]:
    """The whole batch as packed rows, and rows without a target until there are `batch.rows`."""
    rows = [pack(batch, pieces) for pieces in planned(batch, cap, whole_groups)]
    return rows + [_IDLE] * (batch.rows - len(rows))


def planned(batch: Batch, cap: int, whole_groups: bool = False) -> list[list[Piece]]:
    """`plan` of a batch."""
    shapes = [(len(g.prompt.token_ids), [len(s.token_ids) for s in g.samples]) for g in batch.groups]
    names = [group.prompt.row.id for group in batch.groups]
    return plan(shapes, cap, names, whole_groups)


def deal(batch: Batch, ranks: int, cap: int, whole_groups: bool = False) -> list[tuple[Batch, Tensor]]:
    """Each rank's groups, and where their tokens stand in [N]. All ranks make the same number of forward passes."""
    sizes = [len(group.prompt.token_ids) + sum(len(sample.token_ids) for sample in group.samples) for group in batch.groups]
    shares = over_ranks(sizes, ranks)
    parts = [batch.select(share) for share in shares]
    rows = max(len(planned(part, cap, whole_groups)) for part in parts)
    return [(replace(part, rows=rows), batch.places(share)) for part, share in zip(parts, shares, strict=True)]


def _split(group: int, prompt: int, responses: Sequence[int], cap: int, names: Sequence[str] | None) -> list[Piece]:
    pieces: list[Piece] = []
    samples: list[int] = []
    tokens = prompt
    for sample, response in enumerate(responses):
        if prompt + response - 1 > cap:
            name = names[group] if names else f"group {group}"
            raise ConfigError(
                f"{name}: sample {sample} needs {prompt + response - 1} tokens ({prompt} of the prompt, {response} of the"
                f" response), more than train.max_tokens_per_microbatch {cap}; raise that limit"
            )
        if tokens + response - 1 > cap:
            pieces.append(Piece(group, tuple(samples), tokens))
            samples, tokens = [], prompt
        samples.append(sample)
        tokens += response - 1
    if samples:
        pieces.append(Piece(group, tuple(samples), tokens))
    return pieces


def _check_whole(
    pieces: Sequence[Piece], groups: Sequence[tuple[int, Sequence[int]]], cap: int, names: Sequence[str] | None
) -> None:
    for piece in pieces:
        prompt, responses = groups[piece.group]
        if len(piece.samples) < len(responses):
            tokens = prompt + sum(responses) - len(responses)
            name = names[piece.group] if names else f"group {piece.group}"
            raise ConfigError(
                f"{name}: its {len(responses)} responses need {tokens} tokens in one"
                f" forward pass, more than train.max_tokens_per_microbatch {cap}; raise that limit or remove the row"
            )


def _first_fit(pieces: Sequence[Piece], cap: int) -> list[list[Piece]]:
    bins: list[list[Piece]] = []
    room: list[int] = []
    for piece in pieces:
        place = next((i for i, free in enumerate(room) if free >= piece.tokens), None)
        if place is None:
            bins.append([])
            room.append(cap)
            place = len(bins) - 1
        bins[place].append(piece)
        room[place] -= piece.tokens
    return bins


def _spread(pieces: Sequence[Piece], count: int) -> list[list[Piece]]:
    """Each piece, longest first, to the lightest of `count` bins."""
    bins: list[list[Piece]] = [[] for _ in range(count)]
    heap = [(0, i) for i in range(count)]
    for piece in pieces:
        tokens, lightest = heapq.heappop(heap)
        bins[lightest].append(piece)
        heapq.heappush(heap, (tokens + piece.tokens, lightest))
    return bins


def _size(pieces: Sequence[Piece]) -> int:
    return sum(piece.tokens for piece in pieces)


def _axes(position_ids: Tensor | None) -> int:
    return 1 if position_ids is None else len(position_ids)


def _positions(position_ids: Tensor | None, length: int, axes: int) -> Tensor:
    return torch.arange(length).expand(axes, -1) if position_ids is None else position_ids


_ZERO, _NONE = torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
_IDLE = Packed(_ZERO, _ZERO, (Segment(0, 1, ()),), sources=_NONE, targets=_NONE, index=_NONE, vision=())
