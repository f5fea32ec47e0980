"""Groups -> packed rows under a hard token cap, each prompt once.

A packed row holds, for each group, the prompt and then its responses; positions restart after the prompt for each
response, and each response attends to its prompt and itself (`attention.py`). A response's last token predicts nothing,
so it is a target but never an input. Prefix sharing in training: PrefixGrouper (arXiv 2506.05433).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlcore.distributed.balance import over_ranks, spread
from rlcore.errors import ConfigError
from rlcore.types import Batch, Group, Packed, Prompt, Segment, Vision

Shapes = Sequence[tuple[int, Sequence[int]]]  # per group: prompt tokens, and response tokens of each sample


@dataclass(frozen=True)
class Piece:
    """Some samples of one group; a group larger than the cap becomes several, each with the prompt."""

    group: int
    samples: tuple[int, ...]
    tokens: int


def plan_microbatches(groups: Shapes, cap: int, names: Sequence[str] | None = None) -> list[list[Piece]]:
    """Plan micro-batches of at most `cap` forwarded tokens for groups of these shapes.

    As few as first-fit-decreasing finds, then balanced over that many where the cap allows.
    ConfigError names a sample that exceeds the cap by itself.
    """
    pieces = [piece for index, group in enumerate(groups) for piece in _split(index, *group, cap, names)]
    pieces.sort(key=lambda piece: -piece.tokens)
    packed = _first_fit(pieces, cap)
    even = [[pieces[number] for number in share] for share in spread([piece.tokens for piece in pieces], len(packed))]
    bins = even if all(_size(pieces) <= cap for pieces in even) else packed
    return [sorted(pieces, key=lambda piece: (piece.group, piece.samples)) for pieces in bins]


def pack(batch: Batch, pieces: Sequence[Piece]) -> Packed:
    """Build one packed row from the pieces."""
    row = _RowBuilder(batch, max((_axes(batch.groups[piece.group].prompt.position_ids) for piece in pieces), default=1))
    for piece in pieces:
        row.add(piece)
    return row.packed()


def alone(prompt: Prompt) -> Packed:
    """A prompt as a row of its own, without targets."""
    length = len(prompt.token_ids)
    positions = _positions(prompt.position_ids, length, _axes(prompt.position_ids))
    return Packed(
        torch.tensor(prompt.token_ids), positions[0] if len(positions) == 1 else positions, (Segment(0, length, ()),),
        predictors=_NONE, targets=_NONE, index=_NONE, names=(prompt.row.id,), vision=(prompt.vision,),
    )  # fmt: skip


def microbatches(batch: Batch, cap: int, whole_groups: bool = False) -> list[Packed]:
    """Pack the whole batch; rows without targets are appended until there are `batch.rows`."""
    rows = [pack(batch, pieces) for pieces in planned(batch, cap, whole_groups)]
    return rows + [_IDLE] * (batch.rows - len(rows))


def planned(batch: Batch, cap: int, whole_groups: bool = False) -> list[list[Piece]]:
    """`plan_microbatches` for a batch, cached for all passes over the same samples. With `whole_groups`, ConfigError names a
    group that does not fit into one micro-batch."""
    shapes, names = _shapes(batch), _names(batch)
    rows = _planned(shapes, cap, names)
    if whole_groups:
        _check_whole(rows, shapes, cap, names)
    return rows


def longest(batch: Batch, whole_groups: bool = False) -> int:
    """Forwarded tokens of the longest sample with its prompt or, with `whole_groups`, of the longest group."""
    beside = sum if whole_groups else max
    return max((prompt + beside(response - 1 for response in responses) for prompt, responses in _shapes(batch)), default=0)


def deal(batch: Batch, ranks: int, cap: int, whole_groups: bool = False) -> list[tuple[Batch, Tensor]]:
    """Split a batch across ranks by token count: each rank's groups, and their tokens' indices in [N]. All ranks run equally
    many forward passes."""
    shares = over_ranks([prompt + sum(responses) for prompt, responses in _shapes(batch)], ranks)
    parts = [batch.select(share) for share in shares]
    rows = max(len(planned(part, cap, whole_groups)) for part in parts)
    return [(replace(part, rows=rows), batch.places(share)) for part, share in zip(parts, shares, strict=True)]


@lru_cache(maxsize=512)  # enough for one step on that many ranks
def _planned(shapes: tuple[tuple[int, tuple[int, ...]], ...], cap: int, names: tuple[str, ...]) -> list[list[Piece]]:
    return plan_microbatches(shapes, cap, names)


def _shapes(batch: Batch) -> tuple[tuple[int, tuple[int, ...]], ...]:
    return tuple((len(group.prompt.token_ids), _responses(group)) for group in batch.groups)


def _responses(group: Group) -> tuple[int, ...]:
    """Tokens of each sample beside the prompt's, one of which is not forwarded."""
    return (1,) if group.prompt.imitated is not None else tuple(len(sample.token_ids) for sample in group.samples)


def _names(batch: Batch) -> tuple[str, ...]:
    return tuple(group.prompt.row.id for group in batch.groups)


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


def _check_whole(rows: Sequence[Sequence[Piece]], groups: Shapes, cap: int, names: Sequence[str]) -> None:
    cut = {piece.group for row in rows for piece in row if len(piece.samples) < len(groups[piece.group][1])}
    for group in sorted(cut):
        prompt, responses = groups[group]
        raise ConfigError(
            f"{names[group]}: its {len(responses)} responses need {prompt + sum(responses) - len(responses)} tokens in one"
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


def _size(pieces: Sequence[Piece]) -> int:
    return sum(piece.tokens for piece in pieces)


class _RowBuilder:
    """A packed row, grown piece by piece: the prompt, then each response without its last token."""

    def __init__(self, batch: Batch, axes: int) -> None:
        """`axes` of the position ids."""
        self._batch, self._axes = batch, axes
        self._input_ids, self._targets, self._predictors, self._index = _Integers(), _Integers(), _Integers(), _Integers()
        self._positions: list[Tensor] = []  # [axes, tokens]
        self._segments: list[Segment] = []
        self._names: list[str] = []
        self._vision: list[Vision | None] = []
        self._experts: list[NDArray[np.integer] | None] = []

    def add(self, piece: Piece) -> None:
        group, start = self._batch.groups[piece.group], len(self._input_ids)
        prompt = group.prompt
        self._input_ids.add(np.asarray(prompt.token_ids))
        self._positions.append(_positions(prompt.position_ids, len(prompt.token_ids), self._axes))
        last = start + len(prompt.token_ids) - 1
        first = self._batch.starts[piece.group]
        if prompt.imitated is not None:
            self._imitate(group.samples[0].token_ids, start + prompt.imitated - 1, first[0])
        chosen = piece.samples if prompt.imitated is None else ()
        lengths = [self._respond(group.samples[one].token_ids, last, first[one], prompt.next_position) for one in chosen]
        self._route([group.samples[one].experts for one in piece.samples], len(prompt.token_ids))
        self._segments.append(Segment(start, len(prompt.token_ids), tuple(lengths)))
        self._names.append(prompt.row.id)
        self._vision.append(prompt.vision)

    def packed(self) -> Packed:
        positions = torch.cat(self._positions, dim=1)
        return Packed(
            input_ids=self._input_ids.tensor(),
            position_ids=positions[0] if self._axes == 1 else positions,
            segments=tuple(self._segments),
            predictors=self._predictors.tensor(),
            targets=self._targets.tensor(),
            index=self._index.tensor(),
            names=self._names,
            vision=self._vision,
            experts=_joined(self._experts),
        )

    def _imitate(self, tokens: NDArray[np.integer], predictors: NDArray[np.integer], first: int) -> None:
        """Add a sample whose tokens are in the prompt already."""
        self._predictors.add(predictors)
        self._targets.add(tokens)
        self._index.add(np.arange(first, first + len(tokens)))

    def _route(self, experts: Sequence[NDArray[np.integer] | None], prompt: int) -> None:
        """Add the experts of a piece's tokens: those of the prompt as its first sample has them."""
        first, *_ = experts
        self._experts.append(None if first is None else first[:prompt])
        self._experts += [None if one is None else one[prompt:] for one in experts]

    def _respond(self, tokens: NDArray[np.integer], last: int, first: int, position: int) -> int:
        """Add a response whose prompt ends at `last` in the row and whose tokens start at `first` in [N]; its input tokens."""
        here, length = len(self._input_ids), len(tokens) - 1
        self._predictors.add(np.array([last]), np.arange(here, here + length))
        self._input_ids.add(tokens[:-1])
        self._targets.add(tokens)
        self._index.add(np.arange(first, first + length + 1))
        self._positions.append(torch.arange(position, position + length).expand(self._axes, -1))
        return length


class _Integers:
    """Integers of a packed row, appended part by part."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.integer]] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, *parts: NDArray[np.integer]) -> None:
        self._parts += parts
        self._length += sum(map(len, parts))

    def tensor(self) -> Tensor:
        """Concatenate the parts to int64."""
        return torch.from_numpy(np.concatenate(self._parts, dtype=np.int64))


def _joined(parts: Sequence[NDArray[np.integer] | None]) -> Tensor | None:
    """Concatenate the parts; None if one is missing."""
    known = [part for part in parts if part is not None]
    return torch.from_numpy(np.concatenate(known).astype(np.int64)) if len(known) == len(parts) else None


def _axes(position_ids: Tensor | None) -> int:
    return 1 if position_ids is None else len(position_ids)


def _positions(position_ids: Tensor | None, length: int, axes: int) -> Tensor:
    return torch.arange(length).expand(axes, -1) if position_ids is None else position_ids


_ZERO, _NONE = torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
_IDLE = Packed(_ZERO, _ZERO, (Segment(0, 1, ()),), predictors=_NONE, targets=_NONE, index=_NONE, names=("",), vision=(None,))
