"""Generated sums, differences and products with whole-number answers: a text task that needs no download."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from rlcore.data.chat import chat
from rlcore.errors import ConfigError
from rlcore.types import Row

Operation = Literal["+", "-", "*"]
_TEST_SHARE = 4  # one problem in four belongs to the test split


def arithmetic(
    path: Path | None = None, *, split: Literal["train", "test"] = "train", count: PositiveInt = 512, seed: int = 0,
    operations: Annotated[Sequence[Operation], Field(min_length=1)] = ("+", "-"), max_value: Annotated[int, Field(ge=9)] = 99,
    instruction: str = "Reply with the number only.",
) -> list[Row]:
    """Problems of two numbers from 0 to max_value; a difference is never negative. Row i depends on seed, split and i only.

    A hash of the operation and the unordered operands decides the split, so no problem of one split, in either order of
    its operands, is in the other, whatever the seeds. Within a split a problem may come twice.
    """
    if path is not None:
        raise ConfigError(f"{path}: arithmetic makes its own rows; remove the path")
    return [_row(index, split, seed, operations, max_value, instruction) for index in range(count)]


def _row(index: int, split: str, seed: int, operations: Sequence[Operation], max_value: int, instruction: str) -> Row:
    source = random.Random(f"arithmetic:{seed}:{split}:{index}")
    while True:
        operation = source.choice(operations)
        left, right = source.randint(0, max_value), source.randint(0, max_value)
        if operation == "-" and left < right:
            left, right = right, left
        if _split(operation, left, right) == split:
            break
    answer = {"+": left + right, "-": left - right, "*": left * right}[operation]
    return Row(
        id=f"arithmetic-{split}:{index}",
        messages=chat(f"What is {left} {operation} {right}?", instruction=instruction),
        answer=str(answer),
        target=str(answer),
        fields={"operation": operation},
    )


def _split(operation: str, left: int, right: int) -> str:
    key = f"{min(left, right)}{operation}{max(left, right)}"
    return "train" if zlib.crc32(key.encode()) % _TEST_SHARE else "test"
