"""Robo2VLM-1 (Chen et al., arXiv 2505.15517): questions about pictures of robots at work, each with lettered choices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from rlcore.data.chat import PLACEHOLDER, conversation
from rlcore.data.files.published import split_records
from rlcore.data.files.record import Record
from rlcore.data.images import pictures
from rlcore.data.prepare.preparation import Example, Preparation, UnusableRow, stored_images, text
from rlcore.data.rows import Rows
from rlcore.rewards.choice import listed
from rlcore.types import Row


def robo2vlm(
    path: Path | None, *, question: str = "question", choices: str = "choices", answer: str = "correct_answer",
    images: str | Sequence[str] = "image", split: str | None = None, instruction: str = "",
) -> Rows:  # fmt: skip
    """Rows by column names: a question, its choices (a list, or the text of a Python list), the right one (a letter, or an
    index from 0), its images (of one column or several). split: which of a folder that holds several.

    The images come first, then the question and a line `A. choice` for each. A row's answer and target are the right line; its
    fields have the choices as a list. ConfigError names a row whose answer is none of its choices.
    """
    shown = (images,) if isinstance(images, str) else tuple(images)
    return Rows(split_records(path, split), partial(_row, question, choices, answer, shown, instruction))


def _row(question: str, choices: str, answer: str, images: tuple[str, ...], instruction: str, record: Record) -> Row:
    offered = _choices(record, choices)
    shown = pictures(_together(record.value(column) for column in images), record.where, record.folder)
    asked = _asked(record.text(question), offered) + instruction
    parts = [{"type": "image"}] * len(shown) + [{"type": "text", "text": asked}]
    right = _lettered(_right(record, answer, offered), offered)
    return Row(
        id=record.id,
        messages=conversation([{"role": "user", "content": parts}], len(shown), "", record.where),
        answer=right,
        target=right,
        images=shown,
        fields={**record.without(question, choices, answer, *images), "choices": offered},
    )


def _together(columns: Iterable[Any]) -> list[Any]:
    """The images of several columns, each one image, a list or none."""
    return [image for value in columns if value is not None for image in (value if isinstance(value, list) else [value])]


def _example(record: Record) -> Example:
    question, offered = text(record, "question", "no-question"), _choices(record, "choices")
    place = _right(record, "correct_answer", offered)
    right, asked = _lettered(place, offered), _asked(question, offered)
    if PLACEHOLDER in asked:
        problem = f"{PLACEHOLDER} in the question or a choice would be read as an image"
        raise UnusableRow("placeholders", f"{record.where}: {problem}")
    images = stored_images(record, "image")
    image = images if isinstance(record.value("image"), list) else images[0]
    columns = {**record.without(), "choices": offered, "correct_answer": ascii_uppercase[place], "image": image}
    return Example(question, right, right, columns, images, asked)


def _asked(question: str, offered: Sequence[str]) -> str:
    lines = "".join(f"{_lettered(place, offered)}\n" for place in range(len(offered)))
    return f"{question}\nChoices:\n{lines}"


def _lettered(place: int, offered: Sequence[str]) -> str:
    return f"{ascii_uppercase[place]}. {offered[place]}"


def _choices(record: Record, column: str) -> list[str]:
    """ConfigError for what is no list of 2 to 26 texts."""
    try:
        offered = listed(record.value(column))
    except ValueError as error:
        raise UnusableRow("no-choices", f"{record.where}: column {column!r} {error}") from None
    if not 2 <= len(offered) <= len(ascii_uppercase):
        many = f"{len(offered)} choices; a question has 2 to {len(ascii_uppercase)}"
        raise UnusableRow("no-choices", f"{record.where}: column {column!r} holds {many}")
    return offered


def _right(record: Record, column: str, offered: Sequence[str]) -> int:
    """The place of the right choice; ConfigError when the answer is none of them."""
    given = text(record, column, "no-answer").strip()
    place = ascii_uppercase.find(given.upper()) if len(given) == 1 and given.isalpha() else _index(given)
    if not 0 <= place < len(offered):
        last = len(offered) - 1
        allowed = f"a letter, A to {ascii_uppercase[last]}, or an index, 0 to {last}"
        message = f"{record.where}: column {column!r} holds {given!r}; the answer is {allowed}"
        raise UnusableRow("answer-outside-choices", message)
    return place


def _index(given: str) -> int:
    return int(given) if given.isdecimal() and len(given) < 3 else -1


PREPARATION = Preparation("keplerccc/Robo2VLM-1", _example, {}, images=True, ability="vqa")
