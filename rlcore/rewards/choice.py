"""The reward for questions with lettered choices: a letter, or the text of a choice."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from rlcore.rewards.math import last_box

_LONGEST = 100_000  # characters of a list's text
_THOUGHT = re.compile(r".*</think>", re.DOTALL | re.IGNORECASE)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_SAID = re.compile(r"\b(?:answer|(?:correct|right|best|final) (?:option|choice))[\s*]*(?:is|[:=：])[\s:：*]*", re.IGNORECASE)
_STYLE = re.compile(r"\\(?:text|mathrm|mathbf)(?:bf|it|rm)?\{([^{}]*)\}|[*`$]")
_CALLED = re.compile(r"(?:option|choice|letter)\s+(?=\W?[A-Za-z]\b)", re.IGNORECASE)
_LONE = re.compile(r"\(?([A-Za-z])\)?[.):!]?")
_LETTERED = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])\s*[.):,-]|([A-Z])(?=\s+(?:because|since|as)\b))\s*(.+)")
_SPACED = re.compile(r"([A-Z])\s+(.+)")
_LETTER = re.compile(r"(?<![\w'])(?:A(?! (?!or\b|and\b|is\b)[a-z])|[B-HJ-Z])(?![\w'])")  # not the words `A cup` and `I think`
_SENTENCE = re.compile(r"[.;]\s")


def choice(response: str, answer: str, fields: Mapping[str, Any], *, choices: str = "choices") -> float:
    """1.0 when the response picks the right choice, by its letter, its text or both, else 0.0.

    What is read, after any </think>: the last box, else the last <answer>, else the line after the last `answer is`, else the
    only line, else the first or last if it is a choice and no other line is another. An explanation may follow, except among
    several lines. Two letters, or a letter with another's text, pick none. The answer is a letter, `A. text` or a text; the
    field `choices` lists the choices. ValueError when the answer is none of them.
    """
    offered = [_plain(one) for one in listed(fields[choices])] if choices in fields else []
    letter, content = _right(answer, offered)
    if not offered:  # only the right one is known
        offered = [""] * ascii_uppercase.index(letter) + [content]
    return float(_picked(response, offered) == letter)


def listed(value: Any) -> list[str]:
    """The choices of a list, or of the text of a Python list, as texts; ValueError saying what it is instead."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip()) if len(value) <= _LONGEST else value
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    if not isinstance(value, list | tuple):
        raise ValueError(f"holds {str(value)[:60]!r}; it is a list of choices, or the text of one as Python writes it")
    texts = [str(one).strip() if isinstance(one, str | int | float) else "" for one in value]
    if empty := [place for place, one in enumerate(texts) if not one]:
        which = f"{str(value[empty[0]])[:60]!r} as choice {empty[0] + 1} of {len(texts)}"
        raise ValueError(f"holds {which}; a choice is a text or number")
    return texts


def _picked(response: str, offered: Sequence[str]) -> str | None:
    """The letter of the choice that a response picks; None for none or several."""
    text = _THOUGHT.sub("", response)
    if re.search("<think>", text, re.IGNORECASE):
        return None  # it was still thinking
    if (box := last_box(text)) is not None:
        return _pick(box, offered, beside=True)
    if tags := _TAGGED.findall(text):
        return _pick(tags[-1], offered, beside=True)
    if said := list(_SAID.finditer(text)):
        return _pick((text[said[-1].end() :].splitlines() or [""])[0], offered, beside=True)
    written = [line for line in text.splitlines() if line.strip()]
    lines = [_pick(line, offered, beside=len(written) == 1) for line in written]
    alone = set(filter(None, lines))
    return alone.pop() if len(alone) == 1 and (lines[0] or lines[-1]) else None


def _pick(text: str, offered: Sequence[str], beside: bool = False) -> str | None:
    """The letter that a text stands for. beside: words may follow the letter or the choice's text."""
    text = _CALLED.sub("", _unstyled(text).strip(), count=1).strip()
    found = {letter for letter, one in zip(ascii_uppercase, offered, strict=False) if one and one == _plain(text)}
    if lone := _LONE.fullmatch(text):
        found.add(lone[1].upper())
    if found:
        return found.pop() if len(found) == 1 else None
    lettered = _LETTERED.fullmatch(text) or _SPACED.fullmatch(text)
    if lettered is None:
        return _pick(_SENTENCE.split(text)[0], offered) if beside and _SENTENCE.search(text) else None
    *letters, rest = lettered.groups()
    letter = next(filter(None, letters)).upper()
    place = ascii_uppercase.index(letter)
    own = offered[place] if place < len(offered) else ""
    if own and _plain(rest) == own:
        return letter
    return letter if beside and lettered.re is _LETTERED and not _names_another(rest, letter, own, offered) else None


def _names_another(rest: str, letter: str, own: str, offered: Sequence[str]) -> bool:
    """Whether the words after a letter speak of another choice: by letter, or by text where they do not begin with its own."""
    if set(_LETTER.findall(rest)) - {letter}:
        return True
    words = _plain(rest)
    if words != own and words in offered:
        return True
    if own and re.match(rf"{re.escape(own)}(?!\w)", words):
        return False
    return any(one and one != own and re.search(rf"(?<!\w){re.escape(one)}(?!\w)", words) for one in offered)


def _right(answer: str, offered: Sequence[str]) -> tuple[str, str]:
    """The letter and text of the right choice."""
    text = answer.strip()
    found = re.fullmatch(r"([A-Z])(?:[.):]\s*(.*))?", text, re.DOTALL)
    if found and (not offered or ascii_uppercase.index(found[1]) < len(offered)):
        place = ascii_uppercase.index(found[1])
        content = _plain(found[2] or "")
        if not offered or not content or content == offered[place]:
            return found[1], offered[place] if offered else content
    if offered.count(_plain(text)) == 1 and (place := offered.index(_plain(text))) < len(ascii_uppercase):
        return ascii_uppercase[place], offered[place]
    raise ValueError(f"the answer {answer!r} is none of the {len(offered)} choices")


def _plain(text: str) -> str:
    """Without styles, capitals, extra spaces and a final dot."""
    return " ".join(_unstyled(text).casefold().split()).strip(" .!\"'。")


def _unstyled(text: str) -> str:
    return _STYLE.sub(lambda found: found[1] or "", text)
