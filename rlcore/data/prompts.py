"""Prompts from rows: length filter, lazy encoding, and sampling order."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlcore.config.sections import DataConfig
from rlcore.errors import ConfigError
from rlcore.types import Prompt, Row

if TYPE_CHECKING:
    from rlcore.protocols import ModelFamily


def fitting(
    rows: Sequence[Row], family: ModelFamily, max_prompt_tokens: int, long_prompts: Literal["drop", "refuse"] = "drop"
) -> list[Row]:
    """Rows of at most `max_prompt_tokens` tokens; ConfigError when one must be refused or none is left."""
    lengths = [family.prompt_length(row) for row in rows]
    long = [(row, length) for row, length in zip(rows, lengths, strict=True) if length > max_prompt_tokens]
    if long and long_prompts == "refuse":
        row, length = long[0]
        raise ConfigError(
            f"{row.id}: {length} prompt tokens, the limit data.max_prompt_tokens is {max_prompt_tokens} ({len(long)} of"
            f" {len(rows)} rows are too long); raise it to {max(lengths)} or set data.long_prompts to drop"
        )
    if len(long) == len(rows):
        raise ConfigError(
            f"all {len(rows)} prompts are longer than data.max_prompt_tokens {max_prompt_tokens}; the shortest has"
            f" {min(lengths, default=0)} tokens, so raise it to at least that"
        )
    return [row for row, length in zip(rows, lengths, strict=True) if length <= max_prompt_tokens]


class Prompts(Sequence[Prompt]):
    """Rows encoded for one model, in order and on access, with an LRU cache of `cache_bytes`."""

    def __init__(
        self, rows: Sequence[Row], family: ModelFamily, cache_bytes: int = 256 * 2**20, dropped_long: int = 0
    ) -> None:
        """`dropped_long`: number of rows already dropped because their prompts are too long."""
        self.rows, self.dropped_long = rows, dropped_long
        self._family = family
        self._cache: OrderedDict[int, Prompt] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._held = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        prompt = self._cache.pop(index, None)
        if prompt is None:
            prompt = self._family.encode(self.rows[index])
            self._held += _size(prompt)
        self._cache[index] = prompt
        while self._held > self._cache_bytes:
            self._held -= _size(self._cache.popitem(last=False)[1])
        return prompt


def encode_all(
    rows: Sequence[Row], family: ModelFamily, max_prompt_tokens: int, long_prompts: Literal["drop", "refuse"] = "drop"
) -> Prompts:
    """Every row that fits, once, in order; for evaluation."""
    kept = fitting(rows, family, max_prompt_tokens, long_prompts)
    return Prompts(kept, family, dropped_long=len(rows) - len(kept))


class PromptSource:
    """Endless stream of prompts, reshuffled each epoch. `drawn`, the number of prompts drawn so far, is its whole state."""

    def __init__(
        self, rows: Sequence[Row], family: ModelFamily, max_prompt_tokens: int,
        long_prompts: Literal["drop", "refuse"] = "drop", seed: int = 0,
    ) -> None:
        self.rows = fitting(rows, family, max_prompt_tokens, long_prompts)
        self.dropped_long = len(rows) - len(self.rows)
        self.drawn = 0
        self._prompts = Prompts(self.rows, family)
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` prompts, across the end of an epoch."""
        places = range(self.drawn, self.drawn + count)
        self.drawn += count
        return [self._prompts[self._row_at(place)] for place in places]

    def _row_at(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.rows))
        if self._order[0] != epoch:
            order = list(range(len(self.rows)))
            random.Random(f"{self._seed}:{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][offset]


def left_out(key: str, found: Prompts | PromptSource, config: DataConfig) -> str | None:
    """Message about rows dropped as too long, if any; `key` is their config section."""
    dropped = found.dropped_long
    if not dropped:
        return None
    return (
        f"{key}: {dropped} of {dropped + len(found.rows)} rows are left out: their prompts are longer than"
        f" data.max_prompt_tokens {config.max_prompt_tokens}"
    )


def _size(prompt: Prompt) -> int:
    """Approximate bytes: 32 per token of the two lists, plus the tensors."""
    tensors = [*(prompt.vision or {}).values(), *([] if prompt.position_ids is None else [prompt.position_ids])]
    return 32 * (len(prompt.token_ids) + len(prompt.engine_token_ids)) + sum(tensor.nbytes for tensor in tensors)
