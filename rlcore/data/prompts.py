"""Prompts from rows: checks and length filter, encoding ahead of time, and the stream of a training run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from rlcore.config.sections import DataConfig
from rlcore.data.images import check_pictures
from rlcore.data.lazy import LazySequence
from rlcore.data.order import Order
from rlcore.errors import ConfigError
from rlcore.types import Prompt, Row

if TYPE_CHECKING:
    from rlcore.protocols import ModelFamily

E = TypeVar("E", Prompt, list[Prompt])

CHECKED_ROWS = 20_000
"""Most training rows that data.check auto reads before the run."""
_AHEAD_BYTES = 2 * 2**30  # of prompts encoded ahead
_CACHE_BYTES = 256 * 2**20  # of prompts already encoded
_CHUNK = 256  # rows whose images are decoded together


def no_check(row: Row) -> None:
    """Accepts every row."""


@dataclass(frozen=True)
class RowFilter:
    """Decides which rows become prompts."""

    family: ModelFamily
    max_prompt_tokens: int
    long_prompts: Literal["drop", "refuse"] = "drop"
    check: Callable[[Row], None] = no_check  # raises ConfigError for a row that the run cannot use

    def length(self, row: Row) -> int:
        """Prompt tokens; ConfigError for an unusable row."""
        self.check(row)
        return self.family.prompt_length(row)

    def fits(self, row: Row) -> bool:
        """Whether the row, drawn without having been read before, is short enough; ConfigError where it must be."""
        length = self.length(row)
        if length > self.max_prompt_tokens and self.long_prompts == "refuse":
            raise self._too_long(row, length, f"; raise it to at least {length}")
        return length <= self.max_prompt_tokens

    def fitting(self, rows: Sequence[Row], key: str = "data.train") -> Kept:
        """Read every row: the ones that fit. ConfigError for a broken image, an id that is there twice, a row that must be
        refused, and when none is left."""
        lengths, ids = np.empty(len(rows), np.int64), dict[str, int]()
        starts = range(0, len(rows), _CHUNK)
        for start in tqdm(starts, f"{key}: rows", unit=f" x {_CHUNK} rows", delay=5, leave=False, disable=None):
            chunk = rows[start : start + _CHUNK]
            check_pictures(row.images for row in chunk)
            for place, row in enumerate(chunk, start):
                if ids.setdefault(row.id, place) != place:
                    first = ids[row.id] + 1
                    raise ConfigError(f"{key}: rows {first} and {place + 1} have the id {row.id!r}; ids must be unique")
                lengths[place] = self.length(row)
        return self._kept(rows, lengths)

    def _kept(self, rows: Sequence[Row], lengths: np.ndarray) -> Kept:
        long = np.flatnonzero(lengths > self.max_prompt_tokens)
        if len(long) and self.long_prompts == "refuse":
            remedy = f"raise it to {lengths.max()} or set data.long_prompts=drop"
            counted = f"({len(long)} of {len(rows)} rows are too long)"
            raise self._too_long(rows[int(long[0])], int(lengths[long[0]]), f" {counted}; {remedy}")
        if len(long) == len(rows):
            raise ConfigError(
                f"all {len(rows)} prompts are longer than data.max_prompt_tokens {self.max_prompt_tokens}; the shortest has"
                f" {lengths.min() if len(lengths) else 0} tokens, so raise it to at least that"
            )
        return Kept(rows, np.flatnonzero(lengths <= self.max_prompt_tokens), len(long))

    def _too_long(self, row: Row, length: int, remedy: str) -> ConfigError:
        limit = f"the limit data.max_prompt_tokens is {self.max_prompt_tokens}"
        return ConfigError(f"{row.id}: {length} prompt tokens, {limit}{remedy}")


class Kept(LazySequence[Row]):
    """The rows at some places."""

    def __init__(self, rows: Sequence[Row], places: np.ndarray, dropped_long: int) -> None:
        """`dropped_long`: number of the other rows, all too long."""
        self._rows, self._places, self.dropped_long = rows, places, dropped_long

    def __len__(self) -> int:
        return len(self._places)

    def at(self, index: int) -> Row:
        return self._rows[int(self._places[index])]


class Encoded(LazySequence[E]):
    """Rows encoded for one model, in order and on access, with an LRU cache of `cache_bytes`."""

    def __init__(
        self, rows: Sequence[Row], encode: Callable[[Row], E], cache_bytes: int = _CACHE_BYTES, dropped_long: int = 0
    ) -> None:
        """`dropped_long`: number of rows already dropped because their prompts are too long."""
        self.rows, self.dropped_long = rows, dropped_long
        self._encode = encode
        self._cache: OrderedDict[int, E] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._held = 0

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, index: int) -> E:
        encoded = self._cache.pop(index, None)
        if encoded is None:
            encoded = self._encode(self.rows[index])
            self._held += _size(encoded)
        self._cache[index] = encoded
        while self._held > self._cache_bytes:
            self._held -= _size(self._cache.popitem(last=False)[1])
        return encoded


@dataclass(frozen=True)
class TrainingSet:
    """A data set of a run."""

    rows: Sequence[Row]
    weight: float | None = None
    dropped_long: int = 0  # rows that are left out already


class PromptSource:
    """Endless stream of prompts over one data set or a mixture. `drawn`, the number of places passed, is its whole state.

    A thread encodes the places that come next, images too, while the engines work.
    """

    def __init__(
        self, sets: Sequence[TrainingSet], encode: Callable[[Row], list[Prompt]], seed: int = 0,
        fits: Callable[[Row], bool] | None = None,
    ) -> None:  # fmt: skip
        """`encode`: one prompt of a row, or several. `fits`: for rows that nobody has read yet, whether to use one; None uses
        all."""
        self.sets, self.drawn = sets, 0
        self.dropped_long = sum(one.dropped_long for one in sets)
        weights = [one.weight for one in sets if one.weight is not None]
        self._order = Order([len(one.rows) for one in sets], weights or None, seed)
        read = encode if fits is None else lambda row: encode(row) if fits(row) else []  # none: the row is passed over
        self._prompts = [Encoded(one.rows, read, _CACHE_BYTES // len(sets)) for one in sets]
        self._fits, self._seed = fits, seed
        self._ahead: dict[int, Future[list[Prompt]]] = {}  # by place
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    def __len__(self) -> int:
        """Rows of all data sets."""
        return sum(len(one.rows) for one in self.sets)

    @property
    def unread(self) -> bool:
        """Whether rows are first read when they are drawn."""
        return self._fits is not None

    def recoded(self, encode: Callable[[Row], list[Prompt]]) -> PromptSource:
        """The same rows in the same order, from the start, in another encoding."""
        return PromptSource(self.sets, encode, self._seed, self._fits)

    def draw(self, count: int) -> list[Prompt]:
        """The prompts of the next `count` rows, across the end of an epoch; ConfigError when a whole pass holds none that
        fits."""
        found: list[list[Prompt]] = []
        passed = 0
        while len(found) < count:
            prompts = self._begun(self.drawn).result()
            self._ahead.pop(self.drawn)
            self.drawn += 1
            passed = 0 if prompts else passed + 1
            found += [prompts] if prompts else []
            self.dropped_long += not prompts
            if passed >= len(self):
                raise ConfigError(f"all {passed} prompts are longer than data.max_prompt_tokens; raise it")
        self._prepare(min(count, _AHEAD_BYTES // max(map(_size, found), default=1)))
        return [prompt for prompts in found for prompt in prompts]

    def close(self) -> None:
        """Stop encoding ahead."""
        self._thread.shutdown(cancel_futures=True)

    def _prepare(self, count: int) -> None:
        """Begin to encode the next `count` places."""
        for place in range(self.drawn, self.drawn + count):
            self._begun(place)

    def _begun(self, place: int) -> Future[list[Prompt]]:
        if place not in self._ahead:
            self._ahead[place] = self._thread.submit(self._encoded, place)
        return self._ahead[place]

    def _encoded(self, place: int) -> list[Prompt]:
        """The prompts at a place."""
        number, row = self._order.at(place)
        return self._prompts[number][row]


def left_out(key: str, dropped: int, kept: int, config: DataConfig) -> str | None:
    """Message about rows dropped as too long, if any; `key` is their config section."""
    if not dropped:
        return None
    return (
        f"{key}: {dropped} of {dropped + kept} rows are left out: their prompts are longer than"
        f" data.max_prompt_tokens {config.max_prompt_tokens}"
    )


def _size(encoded: Prompt | list[Prompt]) -> int:
    """Approximate bytes: 32 per token of the two lists, plus the tensors."""
    return sum(map(_bytes, encoded)) if isinstance(encoded, list) else _bytes(encoded)


def _bytes(prompt: Prompt) -> int:
    tensors = [*(prompt.vision or {}).values(), *([] if prompt.position_ids is None else [prompt.position_ids])]
    return 32 * (len(prompt.token_ids) + len(prompt.engine_token_ids)) + sum(tensor.nbytes for tensor in tensors)
