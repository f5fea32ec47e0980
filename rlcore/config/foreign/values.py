"""Kinds of values in another framework's file. Each function returns the value; ValueError says what it must be."""

from __future__ import annotations

import math
from typing import Any


def whole(value: Any) -> int:
    number_ = number(value)
    if not number_.is_integer():
        raise ValueError("must be a whole number")
    return int(number_)


def number(value: Any) -> float:
    """Numbers may be text, as those of environment variables are."""
    try:
        found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ValueError("must be a number")
    return found


def flag(value: Any) -> bool:
    named = {"true": True, "false": False}
    found = value if isinstance(value, bool) else named.get(str(value).lower())
    if found is None:
        raise ValueError("must be true or false")
    return found


def text(value: Any) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool) or value == "":
        raise ValueError("must be a text")
    return str(value)


def texts(value: Any) -> list[str]:
    """A list, or one text with commas."""
    entries = value.split(",") if isinstance(value, str) else value
    if not isinstance(entries, list):
        raise ValueError("must be a text or a list of texts")
    return [text(entry).strip() for entry in entries]


def numbers(value: Any) -> list[float]:
    """A list, or one number."""
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise ValueError("must be a number or a list of numbers")
    return [number(entry) for entry in entries]


def top_k(value: Any) -> int:
    """0 or -1, with which engines turn the limit off, is 0 here."""
    return max(whole(value), 0)


def interval(value: Any) -> int:
    """0 or less, which turns it off, is 0 here."""
    return max(whole(value), 0)
