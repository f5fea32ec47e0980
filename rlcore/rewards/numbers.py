"""Parse numbers as people and models write them, into exact values."""

from __future__ import annotations

import re
from fractions import Fraction

from rlcore.rewards.latex import THOUSANDS, clean

_LONGEST = 200  # characters; longer texts are not parsed
_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_WRITTEN = re.compile(
    rf"([-+]?)\s*(?:(?P<value>{_DECIMAL})(?:\s*\\(?:cdot|times)\s*10\^\{{?(?P<power>[-+]?\d{{1,3}})\}}?|/(?P<over>\d+))?"
    rf"|(?P<whole>\d+)?\s*\\frac\{{(?P<top>\s*-?\d+\s*)\}}\{{(?P<bottom>\s*-?\d+\s*)\}})"
)
_WORDS = re.compile(r"\\text\{[^{}\d]*\}(?:\s*\^\{?\d\}?)?|(?<![\\A-Za-z])[A-Za-z]{2,}")
_FOUND = re.compile(
    rf"(?<![\d.])-?\\?\$?(?:{THOUSANDS}|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?"
    r"|-?\\[dtc]?frac\{-?\d+\}\{-?\d+\}"
)


def number(text: str) -> Fraction | None:
    """Value of a text that is one number: a decimal, a fraction, a mixed number, a power of ten; else None.

    Thousands separators, a dollar or percent sign and a final dot are ignored.
    """
    if len(text) > _LONGEST:
        return None
    found = _WRITTEN.fullmatch(clean(text).removesuffix(r"\%").strip().removesuffix("."))
    return _value(found) if found else None


def only_number(text: str) -> Fraction | None:
    """The only number beside words and units; None where there are several, or other mathematics."""
    if len(text) > _LONGEST:
        return None
    return number(_WORDS.sub("|", clean(text)).lstrip("|:, ").rstrip("|:., "))


def last_number(text: str) -> Fraction | None:
    """The last number in running text."""
    found = _FOUND.findall(text.replace("\u2212", "-"))
    return number(found[-1]) if found else None


def _value(found: re.Match[str]) -> Fraction | None:
    if found["value"]:
        value = Fraction(found["value"]) * Fraction(10) ** int(found["power"] or 0)
        top, bottom, whole = value.numerator, value.denominator * int(found["over"] or 1), 0
    else:
        top, bottom, whole = int(found["top"]), int(found["bottom"]), int(found["whole"] or 0)
    if not bottom:
        return None
    return (whole + Fraction(top, bottom)) * (-1 if found[1] == "-" else 1)
