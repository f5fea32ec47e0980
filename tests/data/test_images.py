"""An image is read as it is seen: turned and mirrored as its orientation tag says, whatever its file's format."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

from rlcore.data.images import decode_image, pictures, sizes
from rlcore.errors import ConfigError

STORED = {  # EXIF 2.3, tag 274: how the image that is seen lies in the file
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.swapaxes(0, 1),
    6: lambda seen: np.rot90(seen),
    7: lambda seen: np.rot90(seen, 2).swapaxes(0, 1),
    8: lambda seen: np.rot90(seen, -1),
}
FORMATS = {"JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}


def blocks(height=32, width=48):
    """An image of 8 x 8 blocks, each of another color, so that JPEG keeps it."""
    colors = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return colors.repeat(8, axis=0).repeat(8, axis=1)


def written(array, orientation, kind, **options):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(file, kind, exif=exif, **options)
    return file.getvalue()


def chunks(data):
    """The chunks of a PNG."""
    start = 8
    while start < len(data):
        (length,) = struct.unpack(">I", data[start : start + 4])
        yield data[start : start + 12 + length]
        start += 12 + length


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", STORED)
def test_an_image_and_its_size_are_those_that_are_seen(orientation, kind, tmp_path):
    seen = blocks()
    (tmp_path / "image").write_bytes(written(STORED[orientation](seen), orientation, kind, **FORMATS[kind]))
    images = pictures("image", "row 1", tmp_path)
    assert sizes(images) == ((48, 32),)
    difference = np.asarray(images[0]).astype(int) - seen
    assert images[0].size == (48, 32) and np.abs(difference).max() <= (3 if kind == "JPEG" else 0)
    assert images[0].getexif().get(ExifTags.Base.Orientation, 1) == 1, "nobody turns it again"


@pytest.mark.parametrize("orientation", STORED)
def test_gray_of_16_bits_and_transparency_are_turned_too(orientation):
    gray = blocks()[:, :, 0].astype(np.uint16) * 257
    image = decode_image(written(STORED[orientation](gray), orientation, "PNG"), "row 1", Path())
    assert np.array_equal(np.asarray(image)[:, :, 0], gray // 257)
    clear = np.dstack([blocks(), np.full((32, 48), 255, np.uint8)])
    clear[:8, :16, 3] = 0
    image = decode_image(written(STORED[orientation](clear), orientation, "PNG"), "row 1", Path())
    assert np.array_equal(np.asarray(image) == 255, np.where(clear[:, :, 3:] == 0, True, blocks() == 255))


def test_a_tag_behind_the_pixels_of_a_png_counts():
    """As some programs write it."""
    data = written(STORED[6](blocks()), 6, "PNG")
    parts = list(chunks(data))
    tag = next(part for part in parts if part[4:8] == b"eXIf")
    parts.remove(tag)
    moved = data[:8] + b"".join([*parts[:-1], tag, parts[-1]])
    images = pictures(moved, "row 1", Path())
    assert sizes(images) == ((48, 32),) and np.array_equal(np.asarray(images[0]), blocks())


def test_a_tag_in_xmp_counts():
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(STORED[6](blocks()))).save(file, "WEBP", lossless=True, xmp=xmp)
    images = pictures(file.getvalue(), "row 1", Path())
    assert sizes(images) == ((48, 32),) and np.array_equal(np.asarray(images[0]), blocks())


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_a_tag_that_means_nothing_changes_nothing(orientation):
    images = pictures(written(blocks(), orientation, "PNG"), "row 1", Path())
    assert sizes(images) == ((48, 32),) and np.array_equal(np.asarray(images[0]), blocks())


def test_an_image_object_is_turned_and_stays_as_it_was():
    given = Image.open(io.BytesIO(written(STORED[8](blocks()), 8, "PNG")))
    images = pictures(given, "row 1", Path())
    for _ in range(2):
        assert sizes(images) == ((48, 32),) and np.array_equal(np.asarray(images[0]), blocks())
    assert given.size == (32, 48) and given.getexif()[ExifTags.Base.Orientation] == 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_size_of_a_tagged_image_is_known_without_its_pixels(kind, monkeypatch):
    data = written(STORED[6](blocks()), 6, kind)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert sizes(pictures(data, "row 1", Path())) == ((48, 32),)


def test_tags_that_cannot_be_read_are_named():
    parts = list(chunks(written(blocks(), 6, "PNG")))
    place = next(number for number, part in enumerate(parts) if part[4:8] == b"eXIf")
    parts[place] = chunk(b"eXIf", b"no tags at all")
    broken = b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    with pytest.raises(ConfigError, match="row 1: the image's orientation cannot be read: "):
        pictures(broken, "row 1", Path())
    with pytest.raises(ConfigError, match="row 1: the image cannot be decoded: "):
        decode_image(broken, "row 1", Path())
