"""MATH (Hendrycks et al., arXiv 2103.03874) as published under MATH-lighteval: competition problems by level and type."""

from __future__ import annotations

from pathlib import Path

from rlcore.data.chat import chat
from rlcore.data.files import Record, read_records
from rlcore.errors import ConfigError
from rlcore.rewards.math import last_boxed
from rlcore.types import Row

INSTRUCTION = "Reason step by step and give the final answer inside \\boxed{}."


def math_lighteval(path: Path | None, *, instruction: str = INSTRUCTION, system: str | None = None) -> list[Row]:
    """Rows from columns problem, level, type, solution. The answer is the solution's last box; level and type are fields."""
    return [_row(record, instruction, system) for record in read_records(path)]


def _row(record: Record, instruction: str, system: str | None) -> Row:
    solution = record.text("solution")
    answer = last_boxed(solution)
    if not answer or not answer.strip():
        raise ConfigError(f"{record.where}: column 'solution' holds no \\boxed{{...}} with an answer")
    return Row(
        id=record.id,
        messages=chat(record.text("problem"), 0, system, instruction, record.where),
        answer=answer,
        target=solution,
        fields=record.without("problem", "solution"),
    )
