"""Geometry3K reward: accuracy plus format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from rlcore.rewards.math import last_box, math, math_verify

OPEN = "<think>"
Weight = Annotated[float, Field(ge=0, le=1)]


def geo3k(
    response: str, answer: str, fields: Mapping[str, Any], *, accuracy: Literal["math_verify", "math"] = "math_verify",
    accuracy_weight: Weight = 0.9, format_weight: Weight = 0.1, prompt: str = "",
) -> float:
    """Score accuracy_weight for a right answer in the last box, plus format_weight for `<think>...</think>...\\boxed{...}`.

    The tag counts as opened where the prompt ends with it, as in chat templates of thinking models. The rule and its
    0.9 / 0.1 follow ChatLearn's and EasyR1's geo3k rewards; TimeoutError as `math_verify`.
    """
    opened = OPEN if prompt.rstrip().endswith(OPEN) else ""
    grade = {"math": math, "math_verify": math_verify}[accuracy]
    right = grade(response, answer, fields) if last_box(response) else 0.0
    return accuracy_weight * right + format_weight * well_formed(opened + response)


def well_formed(response: str) -> bool:
    """Whether the response begins with <think> and has, in this order, </think>, \\boxed{ and }."""
    if not response.startswith(OPEN):
        return False
    place = len(OPEN)
    for mark in ("</think>", "\\boxed{", "}"):
        found = response.find(mark, place)
        if found < 0:
            return False
        place = found + len(mark)
    return True
