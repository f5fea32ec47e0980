"""Rows of a data set, by registered name or from the user's files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from traceback import extract_tb
from typing import Any

from rlcore import registry
from rlcore.config.sections import DatasetConfig
from rlcore.data.chat import PLACEHOLDER, conversation
from rlcore.data.files import Record, check_text, read_records
from rlcore.data.images import check_pictures, pictures
from rlcore.errors import ConfigError, PluginError, RlcoreError
from rlcore.types import Row


def rows(
    path: str | Path | None, *, prompt: str = "prompt", answer: str | None = "answer", target: str | None = None,
    rejected: str | None = None, images: str | None = None, id: str | None = None, system: str | None = None,
    instruction: str = "",
) -> list[Row]:
    """Read rows of a file by column names; `system` and `instruction` are texts. Other columns go to the reward as fields.

    The prompt column holds a text or a list of chat messages. answer=None: data without answers. target: the SFT response, and
    with `rejected` the chosen one of a preference pair.
    """
    return [_row(record, prompt, answer, target, rejected, images, id, system, instruction) for record in read_records(path)]


def load_rows(config: DatasetConfig, key: str = "data.train") -> list[Row]:
    """Load and check the rows a run file configures: unique ids, images that decode, at least one row. `key` is the config
    section, for messages."""
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
    """Call the data set function; PluginError with the file and line where it failed."""
    try:
        return list(function(None if config.path is None else Path(config.path), **options))
    except RlcoreError:
        raise
    except Exception as error:
        place = extract_tb(error.__traceback__)[-1]
        raise PluginError(f"{key}: {config.name!r} failed: {error!r} ({place.filename}:{place.lineno})") from error


def _check_unshown(record: Record, messages: Sequence[Any], images: str | None) -> None:
    """ConfigError for a row without images whose prompt holds `<image>`: it would be read as text."""
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
    texts = {"id": row.id, "answer": row.answer, "target": row.target, "rejected": row.rejected}
    for name, text in texts.items():
        if not isinstance(text, str) and not (text is None and name in ("target", "rejected")):
            raise ConfigError(f"{what}: {name} of the row {row.id!r} is a {type(text).__name__}; it must be a text")
    for name, value in {**texts, "messages": row.messages, "fields": row.fields}.items():
        check_text(value, f"{what}: {name} of the row {row.id!a}")
