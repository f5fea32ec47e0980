"""GSM8K (Cobbe et al., arXiv 2110.14168): grade-school problems whose worked answer ends with `#### N`."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from rlcore.data.chat import chat
from rlcore.data.files import open_records
from rlcore.data.records import Record
from rlcore.data.rows import Rows
from rlcore.errors import ConfigError
from rlcore.types import Row

INSTRUCTION = "Solve this step by step and end with the final number inside \\boxed{}."
_NUMBER = re.compile(r"\$?(-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)))\.?")
_CALCULATION = re.compile(r"<<[^<>]*>>")


def gsm8k(path: Path | None, *, instruction: str = INSTRUCTION) -> Rows:
    """Rows from columns question and answer. A row's answer is N without commas; its target the worked answer, then \\boxed{N}.

    ConfigError names a row whose answer ends in anything but one decimal number.
    """
    return Rows(open_records(path), partial(_row, instruction))


def _row(instruction: str, record: Record) -> Row:
    worked, mark, final = record.text("answer").rpartition("####")
    found = _NUMBER.fullmatch(final.strip())
    if not mark or not found:
        raise ConfigError(
            f"{record.where}: column 'answer' does not end with '#### <number>' but with {(mark + final).strip()[-60:]!r};"
            " write one decimal number there, or read the file with `name: rows`"
        )
    answer = found[1].replace(",", "")
    solution = _CALCULATION.sub("", worked).strip()
    return Row(
        id=record.id,
        messages=chat(record.text("question"), 0, instruction, record.where),
        answer=answer,
        target=f"{solution}\n\\boxed{{{answer}}}",
        fields=record.without("question", "answer"),
    )
