"""MATH (Hendrycks et al., arXiv 2103.03874) as published under MATH-lighteval: competition problems by level and type."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rlcore.data.chat import chat
from rlcore.data.files.published import split_records
from rlcore.data.files.record import Record
from rlcore.data.prepare.preparation import Example, Preparation, UnusableRow, text
from rlcore.data.rows import Rows
from rlcore.rewards.math import last_boxed
from rlcore.types import Row

from .layouts import BOXED_INSTRUCTION

INSTRUCTION = "Reason step by step and give the final answer inside \\boxed{}."


def math_lighteval(path: Path | None, *, split: str | None = None, instruction: str = INSTRUCTION) -> Rows:
    """Rows from columns problem, level, type, solution. The answer is the solution's last box; level and type are fields.
    split: which of a folder that holds several."""
    return Rows(split_records(path, split), partial(_row, instruction))


def _row(instruction: str, record: Record) -> Row:
    solution = record.text("solution")
    return Row(
        id=record.id,
        messages=chat(record.text("problem"), 0, instruction, record.where),
        answer=_boxed(record, solution),
        target=solution,
        fields=record.without("problem", "solution"),
    )


def _boxed(record: Record, solution: str) -> str:
    answer = last_boxed(solution)
    if not answer or not answer.strip():
        raise UnusableRow("no-answer", f"{record.where}: column 'solution' holds no \\boxed{{...}} with an answer")
    return answer


def _example(record: Record) -> Example:
    problem, solution = text(record, "problem", "no-question"), text(record, "solution", "no-answer")
    return Example(problem, _boxed(record, solution), solution, record.without())


PREPARATION = Preparation(
    "DigitalLearningGmbH/MATH-lighteval", _example, dict.fromkeys(("chatlearn", "mindspeed", "verl"), BOXED_INSTRUCTION)
)
