"""What `rlcore data` is made of: examples of a published data set, and layouts that give them columns.

A preparation is registered in `rlcore.preparations`, a layout in `rlcore.layouts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from rlcore.data.chat import PLACEHOLDER
from rlcore.data.files.record import Record
from rlcore.data.images import decode_image, image_bytes
from rlcore.errors import ConfigError


class UnusableRow(ConfigError):
    """A row that nothing can be learned from. `rlcore data` leaves it out and counts it by `reason`, a hyphenated name."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


class StoredImage(TypedDict):
    """An image as data sets on the hub store it."""

    bytes: bytes
    path: str | None


@dataclass(frozen=True)
class Example:
    """One row of a published data set, before a layout gives it columns."""

    question: str  # as published
    answer: str  # what a reward compares with
    published: str  # the answer as published: a worked solution, a letter with its choice
    columns: Mapping[str, Any]  # as published, images as StoredImage
    images: Sequence[StoredImage] = ()  # as many as `<image>` in the prompt; where it has none, they come first
    prompt: str = ""  # what the model reads, where that is more than the question


@dataclass(frozen=True)
class Preparation:
    """A published data set: how a record becomes an example, and what layouts say of all of them."""

    source: str  # its id on the hub
    read: Callable[[Record], Example]  # UnusableRow for a row to leave out, ConfigError for a file that is another data set's
    instructions: Mapping[str, str]  # asked after each question, by layout
    images: bool = False
    ability: str = "math"

    def __call__(self, record: Record) -> Example:
        return self.read(record)


@dataclass(frozen=True)
class Origin:
    """Where an example comes from, and what is asked after it."""

    source: str
    ability: str
    split: str
    index: int  # place in the published split, from 0
    instruction: str = ""


@dataclass(frozen=True)
class Layout:
    """Columns and file format of a kind of training file. `file` is that of one split."""

    columns: Callable[[Example, Origin], Mapping[str, Any]]
    suffix: str  # of data sets without images: .jsonl and .json are a line a row, .parquet
    suffix_images: str = ".parquet"
    types: Callable[[], Mapping[str, Any]] = dict  # Arrow types of columns in parquet; those of others are inferred

    def __call__(self, example: Example, origin: Origin) -> Mapping[str, Any]:
        return self.columns(example, origin)

    def file(self, split: str, images: bool) -> str:
        return f"{split}{self.suffix_images if images else self.suffix}"


def text(record: Record, column: str, reason: str) -> str:
    """`record.text`; UnusableRow where the column is there and this row's value is not."""
    record.value(column)
    try:
        return record.text(column)
    except ConfigError as error:
        raise UnusableRow(reason, str(error)) from None


def stored_images(record: Record, column: str) -> list[StoredImage]:
    """Bytes of a column's images, one or a list, unchanged; UnusableRow for one that cannot be decoded, and for none."""
    value = record.value(column)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not values:
        raise UnusableRow("no-image", f"{record.where}: column {column!r} holds no image")
    return [_stored(one, record) for one in values]


def check_placeholders(prompt: str, images: int, where: str) -> None:
    """UnusableRow when the prompt has `<image>`, and not once an image."""
    if (count := prompt.count(PLACEHOLDER)) not in (0, images):
        problem = f"{count} {PLACEHOLDER} placeholders for {images} images; there must be one an image"
        raise UnusableRow("placeholders", f"{where}: {problem}")


def with_instruction(prompt: str, instruction: str) -> str:
    return f"{prompt} {instruction}" if instruction else prompt


def with_placeholders(prompt: str, images: int) -> str:
    """The prompt with one `<image>` an image, before the text where it has none."""
    return prompt if PLACEHOLDER in prompt else PLACEHOLDER * images + prompt


def _stored(value: Any, record: Record) -> StoredImage:
    path = value.get("path") if isinstance(value, Mapping) else None
    try:
        content = image_bytes(value, record.where, record.folder)
        decode_image(content, record.where, record.folder)
    except ConfigError as error:
        raise UnusableRow("unreadable-image", str(error)) from None
    except OSError as error:
        raise UnusableRow("unreadable-image", f"{record.where}: the image cannot be read: {error}") from None
    return {"bytes": content, "path": path if isinstance(path, str) else None}


def image_types() -> Mapping[str, Any]:
    """The columns `image` and `images` as on the hub."""
    import pyarrow

    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    return {"image": image, "images": pyarrow.list_(image)}


OURS = Layout(lambda example, origin: example.columns, ".jsonl", types=image_types)
