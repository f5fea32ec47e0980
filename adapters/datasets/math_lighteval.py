"""MATH (Hendrycks et al., arXiv 2103.03874) as published under MATH-lighteval: competition problems by level and type."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rlcore.data.chat import chat
from rlcore.data.files import open_records
from rlcore.data.records import Record
from rlcore.data.rows import Rows
from rlcore.errors import ConfigError
from rlcore.rewards.math import last_boxed
from rlcore.types import Row

INSTRUCTION = "Reason step by step and give the final answer inside \\boxed{}."


def math_lighteval(path: Path | None, *, instruction: str = INSTRUCTION) -> Rows:
    """Rows from columns problem, level, type, solution. The answer is the solution's last box; level and type are fields."""
    return Rows(open_records(path), partial(_row, instruction))


def _row(instruction: str, record: Record) -> Row:
    solution = record.text("solution")
    answer = last_boxed(solution)
    if not answer or not answer.strip():
        raise ConfigError(f"{record.where}: column 'solution' holds no \\boxed{{...}} with an answer")
    return Row(
        id=record.id,
        messages=chat(record.text("problem"), 0, instruction, record.where),
        answer=answer,
        target=solution,
        fields=record.without("problem", "solution"),
    )
