"""Rewards for mathematics: exact LaTeX equality, symbolic equality, and the last number of a word problem."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

from pydantic import NonNegativeInt

_BOX = re.compile(r"\\(?:boxed|fbox)(?: *(\{)| )")
_NUMBER = re.compile(r"(?<![\d.])-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_FINAL = re.compile(r"####\s*(.+)")
_REMOVED = ("\n", r"\!", r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$")


def math(response: str, answer: str, fields: Mapping[str, Any]) -> float:
    """1.0 when the last box of the response equals the answer after `strip_string`, else 0.0.

    The rule of the MATH data set (Hendrycks et al., arXiv 2103.03874).
    """
    content = last_boxed(response)
    return float(content is not None and strip_string(content) == strip_string(answer))


def math_verify(response: str, answer: str, fields: Mapping[str, Any], *, timeout_seconds: NonNegativeInt = 5) -> float:
    """1.0 when the last box of the response (the whole of it where there is none) equals the answer symbolically, else 0.0.

    Equality of the strings is tried first, then the math-verify package. TimeoutError after `timeout_seconds` (0 is off;
    outside the main thread there is no limit, as the package's clock is a signal).
    """
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    content = last_boxed(response)
    if content is not None and strip_string(content) == strip_string(answer):
        return 1.0
    limit = timeout_seconds if threading.current_thread() is threading.main_thread() else 0
    try:
        gold = parse(_boxed(answer), parsing_timeout=limit, raise_on_error=True)
        given = _attempt(parse, response if content is None else _boxed(content), parsing_timeout=limit)
        return float(bool(given) and bool(_attempt(verify, gold, given, timeout_seconds=limit)))
    except TimeoutException:
        raise TimeoutError(f"comparing with the answer {answer!r} took longer than {timeout_seconds} s") from None


def gsm8k(
    response: str, answer: str, fields: Mapping[str, Any], *, extract: Literal["flexible", "strict"] = "flexible"
) -> float:
    """1.0 when the response's number equals the answer's, else 0.0; commas, $, % and trailing zeros do not matter.

    The number is read from the last box, else from the last `#### N`, else (flexible) it is the last number of the text. strict
    wants the box or line to hold the number alone. ValueError when the answer is no number.
    """
    expected = number(answer)
    if expected is None:
        raise ValueError(f"the answer {answer!r} is not a number")
    found = _final_number(response, extract == "flexible")
    return float(found is not None and found == expected)


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} or \\fbox{...}; of `\\boxed x`, what stands before the next `$`.

    None without a box, or when the last one never closes. Escaped braces do not count.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    return _balanced(text, start) if boxes[-1][1] else text[start:].split("$")[0].strip()


def strip_string(text: str) -> str:
    """A LaTeX answer without what does not change its value, after the MATH data set's normalization.

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


def number(text: str) -> Decimal | None:
    """The value of a text that is one number, whatever its commas, dollar or percent sign and final dots; else None."""
    text = text.strip().rstrip(".").removesuffix("%").removesuffix("\\").strip()
    found = _NUMBER.fullmatch(text.replace("\\$", "$"))
    return _value(found[0]) if found else None


def _balanced(text: str, start: int) -> str | None:
    """What stands between the brace opened just before `start` and its partner."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[start : start + brace.start()]
    return None


def _boxed(content: str) -> str:
    return f"\\boxed{{{content}}}"


def _attempt(function: Any, *arguments: Any, **options: Any) -> Any:
    """None when sympy cannot make sense of a response: it is wrong, not an error. A timeout, no Exception, passes."""
    try:
        return function(*arguments, raise_on_error=True, **options)
    except Exception:
        return None


def _final_number(response: str, flexible: bool) -> Decimal | None:
    lines = _FINAL.findall(response)
    marked = last_boxed(response) or (lines[-1] if lines else None)
    if marked is not None:
        numbers = _NUMBER.findall(marked)
        return _value(numbers[0]) if flexible and len(numbers) == 1 else number(marked)
    numbers = _NUMBER.findall(response) if flexible else []
    return _value(numbers[-1]) if numbers else None


def _value(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", ""))
