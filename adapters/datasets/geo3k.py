"""Geometry3K (Lu et al., arXiv 2105.04165) as published for reinforcement learning: a diagram, a problem, an answer."""

from __future__ import annotations

from pathlib import Path

from rlcore.data.files.record import Record
from rlcore.data.prepare.preparation import Example, Preparation, check_placeholders, stored_images, text
from rlcore.data.rows import Rows, rows

from .layouts import GEOMETRY_INSTRUCTION

INSTRUCTION = (
    "First reason about the problem inside <think> </think> tags, then give the final answer inside \\boxed{}."
)


def geo3k(path: Path | None, *, split: str | None = None, instruction: str = INSTRUCTION) -> Rows:
    """Rows from columns images (a list of {bytes, path}), problem (with `<image>` placeholders), answer. split: which of a
    folder that holds several."""
    return rows(path, prompt="problem", images="images", instruction=instruction, split=split)


def _example(record: Record) -> Example:
    problem, answer = text(record, "problem", "no-question"), text(record, "answer", "no-answer")
    images = stored_images(record, "images")
    check_placeholders(problem, len(images), record.where)
    return Example(problem, answer, answer, {**record.without(), "images": images}, images)


PREPARATION = Preparation(
    "hiyouga/geometry3k", _example, dict.fromkeys(("chatlearn", "mindspeed", "verl"), GEOMETRY_INSTRUCTION), images=True
)
