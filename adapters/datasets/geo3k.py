"""Geometry3K (Lu et al., arXiv 2105.04165) as published for reinforcement learning: a diagram, a problem, an answer."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rlcore.data.chat import conversation
from rlcore.data.preparation import Example, Preparation, check_placeholders, stored_images, text
from rlcore.data.published import split_records
from rlcore.data.records import Record
from rlcore.data.rows import Rows, chat_of, shown_with
from rlcore.types import Row

from .layouts import GEOMETRY_INSTRUCTION

INSTRUCTION = (
    "First reason about the problem inside <think> </think> tags, then give the final answer inside \\boxed{}."
)


def geo3k(path: Path | None, *, split: str | None = None, instruction: str = INSTRUCTION) -> Rows:
    """Rows from columns images (a list of {bytes, path}), problem (with `<image>` placeholders), answer. split: which of a
    folder that holds several."""
    return Rows(split_records(path, split), partial(_row, instruction))


def _row(instruction: str, record: Record) -> Row:
    asked = chat_of(record, "problem")
    shown = shown_with(record, asked, "images")
    return Row(
        id=record.id,
        messages=conversation(asked, len(shown), instruction, record.where),
        answer=record.text("answer"),
        images=shown,
        fields=record.without("problem", "answer", "images"),
    )


def _example(record: Record) -> Example:
    problem, answer = text(record, "problem", "no-question"), text(record, "answer", "no-answer")
    images = stored_images(record, "images")
    check_placeholders(problem, len(images), record.where)
    return Example(problem, answer, answer, {**record.without(), "images": images}, images)


PREPARATION = Preparation(
    "hiyouga/geometry3k", _example, dict.fromkeys(("chatlearn", "mindspeed", "verl"), GEOMETRY_INSTRUCTION), images=True
)
