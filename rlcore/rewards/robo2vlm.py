"""The reward of RLinf's evaluation on Robo2VLM-1: the whole line of the right choice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SPANS = (  # of the assistant, in a text with chat tags
    re.compile(r"<\|im_start\|>assistant\s*(.*?)<\|im_end\|>", re.DOTALL | re.IGNORECASE),
    re.compile(r"<\|assistant\|>\s*(.*?)(?:<\|end\|>|$)", re.DOTALL | re.IGNORECASE),
)
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)
_MARKED = (
    re.compile(r"(?:final answer is|the answer is)\s*[:：]?\s*(.+)$", re.DOTALL | re.IGNORECASE),
    re.compile(r"answer\s*[:：]\s*(.+)$", re.DOTALL | re.IGNORECASE),
)


def robo2vlm(response: str, answer: str, fields: Mapping[str, Any]) -> float:
    """1.0 when what `extracted` finds in the response equals the answer, `A. text`, but for capitals and spaces; else 0.0.

    The rule by which RLinf reports its accuracy, to the letter: docs/rewards.md says where it errs.
    """
    return float(_normalized(extracted(response)) == _normalized(answer))


def extracted(text: str) -> str:
    """The last assistant span, without thoughts; of it the line after the first answer mark, of that the last box, of that the
    last line, without backquotes around it and dots, then slashes, at its end. What is not there is passed over."""
    spans = next((found for pattern in _SPANS if (found := pattern.findall(text))), [text])
    text = _THOUGHT.sub("", spans[-1]).strip()
    for pattern in _MARKED:
        found = pattern.search(text)
        if found and (line := found[1].strip().split("\n")[0].split("<|im_end|>")[0].strip()):
            text = line
            break
    text = _boxed(text) or text
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    text = lines[-1] if lines else text
    return text.strip().strip("`").strip().rstrip(".").rstrip("/")


def _boxed(text: str) -> str:
    """Content of the last `boxed`, with or without braces; of one that never closes, all that follows."""
    _, mark, rest = text.rpartition("boxed")
    rest = rest.strip() if mark else ""
    if not rest.startswith("{"):
        return rest.split("$")[0].strip()
    depth = 0
    for place, letter in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return rest[1:place].strip()
    return rest[1:].strip()


def _normalized(text: str) -> str:
    return " ".join(text.lower().split())
