"""Pictures of data sets, from any form they are kept in; opened early so that a wrong one is named, decoded late."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from rlcore.errors import ConfigError


@dataclass(frozen=True)
class Pictures(Sequence[Image.Image]):
    """Images made from their sources each time one is looked at, so a data set of pictures need not fit in memory."""

    make: Callable[[Any], Image.Image]  # importable, so that rows can travel between processes
    sources: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Pictures(self.make, self.sources[index])
        return self.make(self.sources[index])


def decode_image(value: Any, where: str, folder: Path) -> Image.Image:
    """An RGB image, transparency on white, from any of the forms data sets use; ConfigError naming `where` when broken.

    A form is a PIL image, bytes, {"bytes", "path"} as in Hugging Face parquet files, a path relative to `folder`, base64,
    or a `data:image/...;base64,` URL. Orientation tags are not applied.
    """
    image = _open_image(value, where, folder)
    try:
        if image.mode == "RGB":
            image.load()
            return image
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # decoders raise whatever they like on broken bytes
        raise ConfigError(f"{where}: the image cannot be decoded: {error}") from error


def pictures(values: Any, where: str, folder: Path) -> Sequence[Image.Image]:
    """The images of a column, one value or a list. Headers are read now, so a wrong file is named; pixels when looked at."""
    if values is None:
        return ()
    values = tuple(values) if isinstance(values, list | tuple) else (values,)
    for value in values:
        _open_image(value, where, folder)
    return Pictures(_decode, tuple((value, where, folder) for value in values)) if values else ()


def _decode(source: tuple[Any, str, Path]) -> Image.Image:
    return decode_image(*source)


def _open_image(value: Any, where: str, folder: Path) -> Image.Image:
    """The image with its header read and its pixels not yet."""
    if isinstance(value, Image.Image):
        return value
    try:
        return Image.open(io.BytesIO(_image_bytes(value, where, folder)))
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: no image file {error.filename}") from None
    except Exception as error:
        raise ConfigError(f"{where}: the image cannot be opened: {error}") from error


def _image_bytes(value: Any, where: str, folder: Path) -> bytes:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: an image is bytes, a path, base64 or {{bytes, path}}, this is a {type(value).__name__}")
    if value.startswith("data:"):
        return _base64(value.partition(",")[2], where, "the data URL")
    if len(value) < 4096 and (Path(value).suffix or (folder / value).is_file()):
        return (folder / value).read_bytes()
    return _base64(value, where, f"{value[:40]!r} is no file in {folder}, and")


def _base64(text: str, where: str, what: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error:
        raise ConfigError(f"{where}: {what} does not hold valid base64") from None
