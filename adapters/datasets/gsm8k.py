"""GSM8K (Cobbe et al., arXiv 2110.14168): grade-school problems whose worked answer ends with `#### N`."""

from __future__ import annotations

import re
from pathlib import Path

from rlcore.data.chat import chat
from rlcore.data.files import Record, read_records
from rlcore.errors import ConfigError
from rlcore.types import Row

INSTRUCTION = "Solve this step by step and end with the final number inside \\boxed{}."
_NUMBER = re.compile(r"\$?(-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)))\.?")
_CALCULATION = re.compile(r"<<[^<>]*>>")


def gsm8k(path: Path | None, *, instruction: str = INSTRUCTION, system: str | None = None) -> list[Row]:
    """Rows from columns question and answer. A row's answer is N without commas; its target the worked answer, then \\boxed{N}.

    ConfigError names a row whose answer ends in anything but one decimal number.
    """
    return [_row(record, instruction, system) for record in read_records(path)]


def _row(record: Record, instruction: str, system: str | None) -> Row:
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
        messages=chat(record.text("question"), 0, system, instruction, record.where),
        answer=answer,
        target=f"{solution}\n\\boxed{{{answer}}}",
        fields=record.without("question", "answer"),
    )
