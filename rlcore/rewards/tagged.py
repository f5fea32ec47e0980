"""The reward for short answers between <answer> tags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from rlcore.rewards.numbers import number

OPEN, CLOSE = "<answer>", "</answer>"


def tagged_answer(
    response: str, answer: str, fields: Mapping[str, Any], *, format_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
) -> float:
    """Score 1.0 when the last <answer>...</answer> holds the answer, as equal text or equal number.

    format_weight is the part of the score for exactly one pair of tags, whatever they hold.
    """
    close = response.rfind(CLOSE)
    start = response.rfind(OPEN, 0, close) if close >= 0 else -1
    if start < 0:
        return 0.0
    right = _same(response[start + len(OPEN) : close].strip(), answer.strip())
    single = response.count(OPEN) == response.count(CLOSE) == 1
    return (1 - format_weight) * right + format_weight * single


def _same(given: str, expected: str) -> bool:
    return given == expected or ((value := number(given)) is not None and value == number(expected))
