"""Images of data sets, from any stored form. Those of checked rows are decoded before a run, so that a broken one is
named; all are at every access, so that they need not fit in memory."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from PIL import ExifTags, Image, ImageOps

from rlcore.data.files.records import tried
from rlcore.errors import ConfigError

_TURNED = range(2, 9)  # orientation tags of images that are stored otherwise than seen
_SIDEWAYS = range(5, 9)  # those whose width and height are swapped
_TAGS_OF_PNG = (b"eXIf", b"Raw profile type ", b"XML:com.adobe.xmp")  # chunks that may hold an orientation
_WHITE = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535, "I": 65535, "F": 1.0}  # 16-bit PGM opens as I


@dataclass(frozen=True)
class Pictures(Sequence[Image.Image]):
    """Lazy images, made from their sources at each access."""

    make: Callable[[Any], Image.Image]  # importable, so that rows can be pickled
    sources: tuple[Any, ...]
    sizes: tuple[tuple[int, int], ...]  # (width, height) of each as seen, known without decoding

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Pictures(self.make, self.sources[index], self.sizes[index])
        return self.make(self.sources[index])


def decode_image(value: Any, where: str, folder: Path) -> Image.Image:
    """Decode an RGB image, transparency on white, from any form data sets use; ConfigError naming `where` when broken.

    A form is a PIL image, bytes, {"bytes", "path"} as in Hugging Face parquet files, a path relative to `folder`, base64,
    or a `data:image/...;base64,` URL. It is turned as its orientation tag (EXIF) says. Gray of more than 8 bits is scaled:
    16-bit and integer pixels from 0..65535, float pixels from 0..1; ConfigError when one lies outside.
    """
    image = _open_image(value, where, folder)
    try:
        image.load()
        if _orientation(image) in _TURNED:
            image = ImageOps.exif_transpose(image)
        image = _eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # decoders may raise anything on broken bytes
        raise ConfigError(f"{where}: the image cannot be decoded: {error}") from error


def pictures(values: Any, where: str, folder: Path) -> Sequence[Image.Image]:
    """Images of a column value, one or a list. Headers are read now, so a wrong file is named; pixels at access."""
    if values is None:
        return ()
    values = tuple(values) if isinstance(values, list | tuple) else (values,)
    sizes = tuple(_size_as_seen(value, where, folder) for value in values)
    return Pictures(_decode, tuple((value, where, folder) for value in values), sizes) if values else ()


def sizes(images: Sequence[Image.Image]) -> Sequence[tuple[int, int]]:
    """(width, height) of each image."""
    return images.sizes if isinstance(images, Pictures) else [image.size for image in images]


def check_pictures(columns: Iterable[Sequence[Image.Image]]) -> None:
    """Decode every image that comes from a file or from a row's bytes, in threads: a broken one is named before the run.

    Takes about 1 ms of a core for a photo of 448 x 448 pixels as JPEG, 5 ms as PNG.
    """
    read = (images for images in columns if isinstance(images, Pictures) and images.make is _decode)
    sources = (source for images in read for source in images.sources)
    with ThreadPoolExecutor() as threads:
        for _ in threads.map(_check, sources):
            pass


def _check(source: tuple[Any, str, Path]) -> None:
    _decode(source)  # drops the pixels at once


def _decode(source: tuple[Any, str, Path]) -> Image.Image:
    return decode_image(*source)


def _size_as_seen(value: Any, where: str, folder: Path) -> tuple[int, int]:
    """(width, height) once turned, from the header; Pillow swaps those of a TIFF itself."""
    image = _open_image(value, where, folder)
    width, height = image.size
    try:
        swapped = image.format != "TIFF" and not _is_untagged(image) and _orientation(image) in _SIDEWAYS
    except Exception as error:
        raise ConfigError(f"{where}: the image's orientation cannot be read: {error}") from error
    return (height, width) if swapped else (width, height)


def _is_untagged(image: Image.Image) -> bool:
    """Whether it is a PNG without tags, as most are: Pillow would decode it to look for one behind the pixels."""
    file = getattr(image, "fp", None)
    return image.format == "PNG" and isinstance(file, io.BytesIO) and not any(tag in file.getvalue() for tag in _TAGS_OF_PNG)


def _orientation(image: Image.Image) -> Any:
    return image.getexif().get(ExifTags.Base.Orientation)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale gray of more than 8 bits to mode L: Pillow's own conversion clips at 255."""
    white = _WHITE.get(image.mode)
    if white is None:
        return image
    pixels = numpy.asarray(image)
    low, high = pixels.min(), pixels.max()
    if not 0 <= low <= high <= white:
        raise ValueError(f"pixels of mode {image.mode} from {low} to {high} are not within 0 to {white}; convert it to 8 bits")
    gray = numpy.rint(pixels / white * 255).astype(numpy.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        gray[pixels == clear] = 255
    return Image.fromarray(gray)


def _open_image(value: Any, where: str, folder: Path) -> Image.Image:
    """Open the image: header only, pixels not decoded."""
    if isinstance(value, Image.Image):
        return value
    try:
        return Image.open(io.BytesIO(image_bytes(value, where, folder)))
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: no image file {error.filename}{tried(error.filename)}") from None
    except Exception as error:
        raise ConfigError(f"{where}: the image cannot be opened: {error}") from error


def image_bytes(value: Any, where: str, folder: Path) -> bytes:
    """An image's encoded content, from any form but a PIL image. ConfigError naming `where`; OSError for an unreadable file."""
    what = f"an object of {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: an image is bytes, a path, base64 or {{bytes, path}}, this is {what}")
    if value.startswith(("http://", "https://")):
        raise ConfigError(f"{where}: {value[:80]!r} is a web address, and none is fetched; download the images and give paths")
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
