"""Rows of a data set, by registered name or from the user's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from traceback import extract_tb
from typing import Any, TypeVar

from rlcore import registry
from rlcore.config.sections import DatasetConfig
from rlcore.data.chat import PLACEHOLDER, conversation, dialogue, inline_images
from rlcore.data.files.published import split_records
from rlcore.data.files.record import MissingColumn, Record, check_text
from rlcore.data.images import pictures
from rlcore.data.lazy import LazySequence
from rlcore.errors import ConfigError, PluginError, RlcoreError
from rlcore.types import Row

T = TypeVar("T")


class Rows(LazySequence[Row]):
    """Rows made from records when they are accessed."""

    def __init__(self, records: Sequence[Record], make: Callable[[Record], Row]) -> None:
        self._records, self._make = records, make

    def __len__(self) -> int:
        return len(self._records)

    def at(self, index: int) -> Row:
        return self._make(self._records[index])


def rows(
    path: str | Path | None, *, prompt: str = "prompt", messages: str | None = None, answer: str | None = "answer",
    target: str | None = None, rejected: str | None = None, images: str | None = None, id: str | None = None,
    source: str | None = None, instruction: str = "", split: str | None = None,
) -> Rows:
    """Rows of a file, or of a `split` of a folder or hub id, by column names, `a.b` for the field b of the column a;
    `instruction` is a text. The other columns go to the reward as fields.

    The prompt column holds a text or a list of chat messages. answer=None: data without answers. target: the SFT response, and
    with `rejected` the chosen one of a preference pair. messages, instead of prompt and target: a chat whose assistant's turns
    are imitated.
    """

    def make(record: Record) -> Row:
        asked = chat_of(record, messages or prompt)
        shown = shown_with(record, asked, images)
        reply, rest = None, ()
        if messages:
            asked, reply, rest = dialogue(asked, len(shown), instruction, record.where)
        else:
            asked = conversation(asked, len(shown), instruction, record.where)
        return Row(
            id=record.text(id) if id else record.id,
            messages=asked,
            answer=record.text(answer) if answer else "",
            target=record.text(target) if target else reply,
            rest=rest,
            rejected=record.text(rejected) if rejected else None,
            images=shown,
            fields=record.without(messages or prompt, answer, target, rejected, images, id),
            source=record.text(source) if source else "",
        )

    return Rows(split_records(path, split), make)


def chat_of(record: Record, column: str) -> list[Any]:
    """The column's chat messages; a text is the user's."""
    asked = record.value(column)
    return asked if isinstance(asked, list) else [{"role": "user", "content": record.text(column)}]


def shown_with(record: Record, messages: Sequence[Any], column: str | None) -> Sequence[Any]:
    """The images of a row: of its column, or those inside its messages. ConfigError for both, and for an `<image>` in the text
    of a row without images: it would be read as text."""
    shown = pictures(record.value(column), record.where, record.folder) if column else ()
    inside = inline_images(messages)
    if inside and shown:
        raise ConfigError(f"{record.where}: images are in the messages and in the column {column!r}; remove one of them")
    if inside:
        return pictures(inside, record.where, record.folder)
    if not shown:
        _check_unshown(record, messages, column)
    return shown


class LoadedRows(LazySequence[Row]):
    """The rows a run file configures, each checked and completed when it is accessed."""

    def __init__(
        self, rows: Sequence[Row], config: DatasetConfig, options: Mapping[str, Any], key: str, system: str | None, prefix: str
    ) -> None:
        """`options`: all of the data set's, defaults too. `key`: section of the run file, for messages. `prefix`: of ids, where
        other data sets have the same."""
        self.key, self._rows, self._config, self._options = key, rows, config, options
        self._system, self._prefix = system, prefix

    def __len__(self) -> int:
        return min(len(self._rows), self._config.max_rows or len(self._rows))

    def at(self, index: int) -> Row:
        row = _called(lambda: self._rows[index], self._config.name, self._options, self.key)
        _check_row(row, f"{self.key}: {self._config.name!r}")
        messages, roles = row.messages, [message.get("role") for message in row.messages]
        if self._system and "system" not in roles:
            messages = [{"role": "system", "content": self._system}, *messages]
        source = row.source or self._config.source or self._config.name
        return replace(row, id=self._prefix + row.id, messages=messages, source=source)


def load_rows(
    config: DatasetConfig, key: str = "data.train", system: str | None = None, prefix: str = ""
) -> LoadedRows:
    """Open the data set a run file configures; at least one row. `key` and the others are as for `LoadedRows`."""
    function = registry.load_dotted(config.name, key) if "." in config.name else registry.load("datasets", config.name)
    options = registry.checked_options(function, config.options, f"{key}.options.", given=1)
    path = None if config.path is None else Path(config.path)
    found = _called(lambda: function(path, **options), config.name, options, key)
    if not isinstance(found, Sequence):  # an iterator
        found = _called(lambda: list(found), config.name, options, key)
    if not len(found):
        raise ConfigError(f"{key}: {config.name!r} holds no rows")
    return LoadedRows(found, config, options, key, system, prefix)


def _called(function: Callable[[], T], name: str, options: Mapping[str, Any], key: str) -> T:
    """Call a part of a data set's code; PluginError with the file and line where it failed."""
    try:
        return function()
    except MissingColumn as error:
        asking = next((f"; {key}.options.{option} names it" for option, value in options.items() if value == error.column), "")
        raise ConfigError(f"{error}{asking}") from None
    except RlcoreError:
        raise
    except Exception as error:
        place, what = extract_tb(error.__traceback__)[-1], f"{type(error).__name__}: {error}"
        raise PluginError(f"{key}: {name!r} failed: {what} ({place.filename}:{place.lineno})") from error


def _check_unshown(record: Record, messages: Sequence[Any], images: str | None) -> None:
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
    """ConfigError for unusable rows of a custom data set; files are checked where they are read."""
    if not isinstance(row, Row):
        raise ConfigError(f"{what} gave a {type(row).__name__}; a data set is a list of rlcore.types.Row")
    texts = {"id": row.id, "answer": row.answer, "source": row.source, "target": row.target, "rejected": row.rejected}
    for name, text in texts.items():
        if not isinstance(text, str) and not (text is None and name in ("target", "rejected")):
            raise ConfigError(f"{what}: {name} of the row {row.id!r} is a {type(text).__name__}; it must be a text")
    for name, value in {**texts, "messages": row.messages, "rest": row.rest, "fields": row.fields}.items():
        check_text(value, f"{what}: {name} of the row {row.id!a}")
