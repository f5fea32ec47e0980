"""GSM8K (Cobbe et al., arXiv 2110.14168): grade-school problems whose worked answer ends with `#### N`."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from rlcore.data.chat import chat
from rlcore.data.files.published import split_records
from rlcore.data.files.record import Record
from rlcore.data.prepare.preparation import Example, Preparation, UnusableRow, text
from rlcore.data.rows import Rows
from rlcore.types import Row

from .layouts import BOXED_INSTRUCTION, HASHES_INSTRUCTION

INSTRUCTION = "Solve this step by step and end with the final number inside \\boxed{}."
_NUMBER = re.compile(r"\$?(-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)))\.?")
_CALCULATION = re.compile(r"<<[^<>]*>>")


def gsm8k(path: Path | None, *, split: str | None = None, instruction: str = INSTRUCTION) -> Rows:
    """Rows from columns question and answer. A row's answer is N without commas; its target the worked answer, then \\boxed{N}.

    split: which of a folder that holds several. ConfigError names a row whose answer ends in anything but one decimal number.
    """
    return Rows(split_records(path, split), partial(_row, instruction))


def _row(instruction: str, record: Record) -> Row:
    worked, answer = _solved(record, record.text("answer"))
    solution = _CALCULATION.sub("", worked).strip()
    return Row(
        id=record.id,
        messages=chat(record.text("question"), 0, instruction, record.where),
        answer=answer,
        target=f"{solution}\n\\boxed{{{answer}}}",
        fields=record.without("question", "answer"),
    )


def _solved(record: Record, published: str) -> tuple[str, str]:
    """The text before `####`, and the number after it."""
    worked, mark, final = published.rpartition("####")
    found = _NUMBER.fullmatch(final.strip())
    if not mark or not found:
        raise UnusableRow(
            "no-answer",
            f"{record.where}: column 'answer' does not end with '#### <number>' but with {(mark + final).strip()[-60:]!r};"
            " write one decimal number there, or read the file with `name: rows`",
        )
    return worked, found[1].replace(",", "")


def _example(record: Record) -> Example:
    question, published = text(record, "question", "no-question"), text(record, "answer", "no-answer")
    return Example(question, _solved(record, published)[1], published, record.without())


PREPARATION = Preparation(
    "openai/gsm8k", _example,
    {"chatlearn": BOXED_INSTRUCTION, "mindspeed": BOXED_INSTRUCTION, "verl": HASHES_INSTRUCTION},
)  # fmt: skip
