"""Rows of files or generators -> Prompts: checked before a run starts, shuffled by epoch, resumed by one integer."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any, Literal

from rlcore import registry
from rlcore.chat import PLACEHOLDER, conversation
from rlcore.config import DataConfig, DatasetConfig
from rlcore.errors import ConfigError, PluginError, RlcoreError
from rlcore.images import check_pictures, pictures
from rlcore.records import Record, check_text, read_records
from rlcore.types import Prompt, Row

if TYPE_CHECKING:
    from rlcore.protocols import Adapter


def rows(
    path: str | Path | None, *, prompt: str = "prompt", answer: str | None = "answer", target: str | None = None,
    rejected: str | None = None, images: str | None = None, id: str | None = None, system: str | None = None,
    instruction: str = "",
) -> list[Row]:
    """Rows of a file by column names; `system` and `instruction` are texts. Other columns go to the reward as fields.

    The prompt column holds a text or a list of chat messages. answer=None is for data without answers; target is the response
    to imitate, and with rejected the preferred one of a pair.
    """
    return [_row(record, prompt, answer, target, rejected, images, id, system, instruction) for record in read_records(path)]


def load_rows(config: DatasetConfig, key: str = "data.train") -> list[Row]:
    """The rows a run file asks for. `key` is the section, for messages; ids are unique, images decode, and there is at least
    one row."""
    function = registry.load_dotted(config.name, key) if "." in config.name else registry.load("datasets", config.name)
    options = registry.checked_options(function, config.options, f"{key}.options.", given=1)
    found = _made(function, config, options, key)[: config.max_rows]
    if not found:
        raise ConfigError(f"{key}: {config.name!r} holds no rows")
    for row in found:
        _check_row(row, f"{key}: {config.name!r}")
    check_pictures(row.images for row in found)
    name, count = Counter(row.id for row in found).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"{key}: {count} rows have the id {name!r}; ids must be unique")
    return found


def fitting(
    rows: Sequence[Row], adapter: Adapter, max_prompt_tokens: int, long_prompts: Literal["drop", "refuse"] = "drop"
) -> list[Row]:
    """The rows of at most `max_prompt_tokens` tokens; ConfigError when one must be refused or none is left."""
    lengths = [adapter.prompt_length(row) for row in rows]
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
    """Rows as one model reads them, in order, encoded when looked at; the latest `cache_bytes` of them are kept."""

    def __init__(
        self, rows: Sequence[Row], adapter: Adapter, cache_bytes: int = 256 * 2**20, dropped_long: int = 0
    ) -> None:
        """`dropped_long`: rows that are not among them, because their prompts are too long."""
        self.rows, self.dropped_long = rows, dropped_long
        self._adapter = adapter
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
            prompt = self._adapter.encode(self.rows[index])
            self._held += _size(prompt)
        self._cache[index] = prompt
        while self._held > self._cache_bytes:
            self._held -= _size(self._cache.popitem(last=False)[1])
        return prompt


def encode_all(
    rows: Sequence[Row], adapter: Adapter, max_prompt_tokens: int, long_prompts: Literal["drop", "refuse"] = "drop"
) -> Prompts:
    """Each row that fits, once, in order; for evaluation."""
    kept = fitting(rows, adapter, max_prompt_tokens, long_prompts)
    return Prompts(kept, adapter, dropped_long=len(rows) - len(kept))


class PromptSource:
    """An endless stream of prompts, shuffled anew each epoch. `drawn`, prompts given out so far, is its whole state."""

    def __init__(
        self, rows: Sequence[Row], adapter: Adapter, max_prompt_tokens: int,
        long_prompts: Literal["drop", "refuse"] = "drop", seed: int = 0,
    ) -> None:
        self.rows = fitting(rows, adapter, max_prompt_tokens, long_prompts)
        self.dropped_long = len(rows) - len(self.rows)
        self.drawn = 0
        self._prompts = Prompts(self.rows, adapter)
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def draw(self, count: int) -> list[Prompt]:
        """The next prompts; they go on into the next epoch where this one ends."""
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
    """What is said of rows that are too long, if there are any; `key` is their section."""
    dropped = found.dropped_long
    if not dropped:
        return None
    return (
        f"{key}: {dropped} of {dropped + len(found.rows)} rows are left out: their prompts are longer than"
        f" data.max_prompt_tokens {config.max_prompt_tokens}"
    )


def _row(
    record: Record, prompt: str, answer: str | None, target: str | None, rejected: str | None, images: str | None,
    id: str | None, system: str | None, instruction: str,
) -> Row:
    shown = pictures(record.value(images), record.where, record.folder) if images else ()
    asked = record.value(prompt)
    messages = asked if isinstance(asked, list) else [{"role": "user", "content": record.text(prompt)}]
    if not shown:
        _check_unshown(record, messages, images)
    return Row(
        id=record.text(id) if id else record.id,
        messages=conversation(messages, len(shown), system, instruction, record.where),
        answer=record.text(answer) if answer else "",
        target=record.text(target) if target else None,
        rejected=record.text(rejected) if rejected else None,
        images=shown,
        fields=record.without(prompt, answer, target, rejected, images, id),
    )


def _made(function: Callable[..., Iterable[Row]], config: DatasetConfig, options: Mapping[str, Any], key: str) -> list[Row]:
    """What the function gives; PluginError with the place where it failed."""
    try:
        return list(function(None if config.path is None else Path(config.path), **options))
    except RlcoreError:
        raise
    except Exception as error:
        place = extract_tb(error.__traceback__)[-1]
        raise PluginError(f"{key}: {config.name!r} failed: {error!r} ({place.filename}:{place.lineno})") from error


def _check_unshown(record: Record, messages: Sequence[Any], images: str | None) -> None:
    """ConfigError for a row without images whose prompt seems to show one: it would be read as text."""
    texts = [message.get("content") for message in messages if isinstance(message, dict)]
    column = images or next((name for name in ("images", "image") if record.values.get(name)), None)
    if column is None or not any(isinstance(text, str) and PLACEHOLDER in text for text in texts):
        return
    problem = f"{column!r} has no image for it; fill it" if images else f"the option images does not name {column!r}; set it"
    raise ConfigError(
        f"{record.where}: the prompt holds {PLACEHOLDER} and {problem}, or, where the tag is meant as text, give the prompt as"
        f" [{{role: user, content: [{{type: text, text: ...}}]}}]"
    )


def _check_row(row: Any, what: str) -> None:
    """ConfigError for what a data set of one's own may make and no run can use; files are checked where they are read."""
    if not isinstance(row, Row):
        raise ConfigError(f"{what} gave a {type(row).__name__}; a data set is a list of rlcore.types.Row")
    texts = {"id": row.id, "answer": row.answer, "target": row.target, "rejected": row.rejected}
    for name, text in texts.items():
        if not isinstance(text, str) and not (text is None and name in ("target", "rejected")):
            raise ConfigError(f"{what}: {name} of the row {row.id!r} is a {type(text).__name__}; it must be a text")
    for name, value in {**texts, "messages": row.messages, "fields": row.fields}.items():
        check_text(value, f"{what}: {name} of the row {row.id!a}")


def _size(prompt: Prompt) -> int:
    """Bytes, roughly: 32 a token of the two lists, and the tensors."""
    tensors = [*(prompt.vision or {}).values(), *([] if prompt.position_ids is None else [prompt.position_ids])]
    return 32 * (len(prompt.token_ids) + len(prompt.engine_token_ids)) + sum(tensor.nbytes for tensor in tensors)
