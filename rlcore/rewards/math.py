"""Rewards for mathematics: exact LaTeX equality, symbolic equality, and the last number of a word problem."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import NonNegativeInt

from rlcore.rewards.bounded import Bounded
from rlcore.rewards.numbers import last_number, number, only_number

_BOX = re.compile(r"\\(?:boxed|fbox)(?: *(\{)| |$)")
_ANY_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?:\s*(\{)|(?![A-Za-z]))")
_COMMENT = re.compile(r"(?<=\d)\s+\((?=[^()]*[A-Za-z])[^()]*\)\s*$")  # 42 (since 6*7=42)
_DENIED = re.compile(r"\b(?:not|isn't)\s+\\?\$?[-\u2212]?\d[\d.,]*")
_FINAL = re.compile(r"####\s*(.+)")
_REMOVED = ("\n", r"\!", r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$")
_SYMBOLIC = Bounded("rlcore.rewards.symbolic")


def math(response: str, answer: str, fields: Mapping[str, Any]) -> float:
    """1.0 when the last box of the response equals the answer after `strip_string`, else 0.0.

    The rule of the MATH data set (Hendrycks et al., arXiv 2103.03874), to the letter: docs/rewards.md says where it errs.
    """
    content = last_boxed(response)
    return float(content is not None and strip_string(content) == strip_string(answer))


def math_verify(response: str, answer: str, fields: Mapping[str, Any], *, timeout_seconds: NonNegativeInt = 5) -> float:
    """1.0 when the response's `final_answer` (the whole of it where there is none) equals the answer symbolically, else 0.0.

    The rules are in `rlcore.rewards.symbolic`. TimeoutError after `timeout_seconds` (0 is no limit).
    """
    given = final_answer(response)
    function, text = ("says", _DENIED.sub("", response)) if given is None else ("equal", given)
    return float(_symbolic(function, text, answer, timeout_seconds))


def gsm8k(
    response: str, answer: str, fields: Mapping[str, Any], *, extract: Literal["flexible", "strict"] = "flexible",
    timeout_seconds: NonNegativeInt = 5,
) -> float:
    """1.0 when the response's number equals the answer's, else 0.0; how the number is written does not matter.

    It is read from the `final_answer`, else (flexible) it is the text's last number. strict allows nothing beside the number;
    flexible allows words and units, and compares expressions as `math_verify` does. ValueError when the answer is not a number
    (nor several between commas), TimeoutError as in `math_verify`.
    """
    expected, given = number(answer), final_answer(response)
    if expected is None and None in map(number, answer.split(",")):
        raise ValueError(f"the answer {answer!r} is not a number")
    if extract == "strict":
        return float(given is not None and expected is not None and number(given) == expected)
    if given is None:
        return float(expected is not None and last_number(_DENIED.sub("", response)) == expected)
    found = None if "%" in given + answer else only_number(given)
    if found is not None and expected is not None:
        return float(found == expected)
    return float(_symbolic("equal", given, answer, timeout_seconds))


def final_answer(response: str) -> str | None:
    """Content of the `last_box`, else the text after the last `####`; None without either."""
    box = last_box(response)
    if box is not None:
        return box
    lines = _FINAL.findall(response)
    return _COMMENT.sub("", lines[-1]) if lines else None


def last_box(response: str) -> str | None:
    """Content of the last \\boxed, \\fbox or \\framebox, with any spacing; None without one.

    Empty, which equals nothing, when it never closes: an earlier box is not the answer.
    """
    boxes = list(_ANY_BOX.finditer(response))
    if not boxes:
        return None
    start = boxes[-1].end()
    return (_balanced(response, start) or "") if boxes[-1][1] else re.split(r"[$\n]", response[start:], maxsplit=1)[0].strip()


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} or \\fbox{...} by MATH's rule; of `\\boxed x`, the text up to the next `$`.

    None without a box, or when the last one never closes. Escaped braces do not count.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    return _balanced(text, start) if boxes[-1][1] else text[start:].split("$")[0].strip() or None


def strip_string(text: str) -> str:
    """Normalize a LaTeX answer by the MATH data set's rule.

    Removed: line breaks, thin spaces, sizing, degrees, dollars, percent signs, a unit at the end, `x =` before, spaces.
    Unified: tfrac, dfrac and frac; \\sqrt3, \\frac12 and a/b with and without braces; .5 and 0.5 as \\frac{1}{2}.
    """
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for removed in _REMOVED:
        text = text.replace(removed, "")
    text = text.split(r"\text{ ")[0].replace(r"\%", "").replace("%", "")
    text = re.sub(r"(^|[ {])\.(?=\d)", r"\g<1>0.", text)
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        text = value
    text = re.sub(r"\\sqrt *([0-9A-Za-z])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([0-9A-Za-z])([0-9A-Za-z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([0-9A-Za-z])\{", r"\\frac{\1}{", text)
    if text == "0.5":
        return r"\frac{1}{2}"
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)


def _balanced(text: str, start: int) -> str | None:
    """Text between the brace opened just before `start` and its partner; None when it never closes."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[start : start + brace.start()]
    return None


def _symbolic(function: str, given: str, answer: str, seconds: int) -> bool:
    if not given.strip():
        return False
    try:
        return _SYMBOLIC.call(function, given, answer, seconds=seconds)
    except TimeoutError:
        raise TimeoutError(f"comparing with the answer {answer!r} took longer than {seconds} s") from None
