"""The row layout of verl, which ChatLearn and MindSpeed-RL write too: a prompt and the rule that grades its answer.

Columns: data_source, prompt or messages, images, ability, reward_model {style, ground_truth}, extra_info.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rlcore.data.chat import conversation
from rlcore.data.files.published import split_records
from rlcore.data.files.record import Record
from rlcore.data.rows import Rows, chat_of, shown_with
from rlcore.errors import ConfigError
from rlcore.types import Row

_PROMPTS = ("prompt", "messages")


def verl(
    path: Path | None, *, answer: str = "reward_model.ground_truth", source: str = "data_source", images: str = "images",
    target: str | None = None, instruction: str = "", split: str | None = None,
) -> Rows:  # fmt: skip
    """Rows of a file, or of a `split` of a folder or hub id. A row's source, by which a reward table chooses, is in the column
    `source`. Images may also be inside the messages (`image_url`), as ChatLearn has them. The other columns go to the reward.
    ConfigError for a row with videos."""
    return Rows(split_records(path, split), partial(_row, answer, source, images, target, instruction))


def _row(answer: str, source: str, images: str, target: str | None, instruction: str, record: Record) -> Row:
    column = next((name for name in _PROMPTS if record.values.get(name) is not None), "prompt")
    if record.values.get("videos"):
        raise ConfigError(f"{record.where}: the row has videos, which are not read; remove it")
    messages = chat_of(record, column)
    shown = shown_with(record, messages, images if record.values.get(images) is not None else None)
    return Row(
        id=record.id,
        messages=conversation(messages, len(shown), instruction, record.where),
        answer=record.text(answer),
        target=record.text(target) if target else None,
        images=shown,
        fields=record.without(*_PROMPTS, images, target),
        source=record.text(source),
    )
