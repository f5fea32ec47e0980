"""Generated geometry figures with whole-number answers: a vision task that needs no download.

A figure is a list of marks on a canvas of 112 units, a pure function of its parameters, drawn lazily.
A hash of the marks decides the split, so the splits share no figure, whatever the seeds, kinds and questions; parameters move
in steps of at least one unit, so that at 112 pixels different marks are different pixels.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image, ImageDraw
from pydantic import Field, PositiveInt

from rlcore.data.chat import chat
from rlcore.data.images import Pictures
from rlcore.errors import ConfigError
from rlcore.types import Row

Kind = Literal["dots", "count", "sides", "length", "angle", "area"]
Mark = tuple[Any, ...]  # a shape's name, its numbers in canvas units, its colour

CANVAS = 112
COLOURS = ("#d00000", "#0040e0", "#008020", "#000000", "#8000a0", "#e06000")
_GRID = "#c0c0c0"
_TEST_SHARE = 4  # one figure in four belongs to the test split
_RECTANGLES = {
    area: [(width, area // width) for width in range(1, 7) if area % width == 0 and area // width <= 6]
    for area in sorted({width * height for width in range(1, 7) for height in range(1, 7)})
}


@dataclass(frozen=True)
class Figure:
    """Marks to draw, a question about them and its answer."""

    marks: tuple[Mark, ...]
    question: str
    answer: int
    thought: str  # reasoning text before the answer


def geometry_figures(
    path: Path | None = None, *, split: Literal["train", "test"] = "train", count: PositiveInt = 512, seed: int = 0,
    size: Annotated[int, Field(ge=CANVAS)] = CANVAS,
    kinds: Annotated[Sequence[Kind], Field(min_length=1)] = ("count", "sides", "length", "angle", "area"),
    largest: PositiveInt | None = None, answer_format: Literal["tag", "boxed"] = "tag", instruction: str = "",
) -> list[Row]:
    """Rows of square figures of `size` pixels, kinds in rotation, the answers of a kind (up to `largest`) equally likely.

    The target is `<answer>N</answer>`, or boxed: `<think>...</think> \\boxed{N}`. Row i depends on seed, split, kinds and i.
    """
    if path is not None:
        raise ConfigError(f"{path}: geometry_figures makes its own rows; remove the path")
    for kind in kinds:
        if largest is not None and largest < min(_KINDS[kind][0]):
            raise ConfigError(f"largest: {largest} leaves {kind} no answer; its smallest is {min(_KINDS[kind][0])}")
    return [
        _row(index, split, seed, size, kinds[index % len(kinds)], largest, answer_format, instruction) for index in range(count)
    ]


def draw(source: tuple[Figure, int]) -> Image.Image:
    """Draw a figure, given with its size in pixels, as an RGB image on white."""
    figure, size = source
    image = Image.new("RGB", (size, size), "white")
    canvas = ImageDraw.Draw(image)
    for shape, *numbers, colour in figure.marks:
        _SHAPES[shape](canvas, [value * size / CANVAS for value in numbers], size / CANVAS, colour)
    return image


def _row(
    index: int, split: str, seed: int, size: int, kind: Kind, largest: int | None, answer_format: str, instruction: str
) -> Row:
    figure = _figure(random.Random(f"geometry:{seed}:{split}:{index}"), kind, largest, split)
    target = f"<answer>{figure.answer}</answer>"
    if answer_format == "boxed":
        target = f"<think>{figure.thought}</think> \\boxed{{{figure.answer}}}"
    return Row(
        id=f"geometry-{split}:{index}",
        messages=chat(figure.question, 1, instruction=instruction),
        answer=str(figure.answer),
        target=target,
        images=Pictures(draw, ((figure, size),), ((size, size),)),
        fields={"kind": kind},
    )


def _figure(source: random.Random, kind: Kind, largest: int | None, split: str) -> Figure:
    """Draw the answer first and keep it while rejecting figures of the other split, so that answers stay uniform."""
    answers, make = _KINDS[kind]
    answer = source.choice([answer for answer in answers if largest is None or answer <= largest])
    while True:
        figure = make(source, answer)
        if _split(figure) == split:
            return figure


def _split(figure: Figure) -> str:
    return "train" if zlib.crc32(repr(figure.marks).encode()) % _TEST_SHARE else "test"


def _dots(source: random.Random, answer: int) -> Figure:
    """Circles only, in the cells of a 4 x 4 grid."""
    marks = [_small(source, "circle", cell) for cell in sorted(source.sample(range(16), answer))]
    return Figure(tuple(marks), "How many circles?", answer, f"I count {answer} circle{'s' * (answer > 1)}.")


def _count(source: random.Random, answer: int) -> Figure:
    """Shapes in the cells of a 4 x 4 grid, sorted by cell so that equal pictures have equal marks."""
    asked, *others = source.sample(("circle", "square", "triangle"), 3)
    shapes = [asked] * answer + [source.choice(others) for _ in range(source.randint(0, 4))]
    cells = source.sample(range(16), len(shapes))
    marks = [_small(source, shape, cell) for cell, shape in sorted(zip(cells, shapes, strict=True))]
    return Figure(tuple(marks), f"How many {asked}s?", answer, f"I count {answer} {asked}{'s' * (answer > 1)}.")


def _small(source: random.Random, shape: str, cell: int) -> Mark:
    x, y = 14 + 28 * (cell % 4) + source.randint(-3, 3), 14 + 28 * (cell // 4) + source.randint(-3, 3)
    return shape, x, y, source.randint(8, 10), source.choice(COLOURS)


def _sides(source: random.Random, answer: int) -> Figure:
    """A regular polygon, rotated by sixths of its symmetry angle."""
    x, y, radius = source.randint(50, 62), source.randint(50, 62), source.randint(34, 46)
    start = 2 * math.pi / answer * source.randrange(6) / 6
    corners = [start + 2 * math.pi * corner / answer for corner in range(answer)]
    points = [round(value, 1) for turn in corners for value in (x + radius * math.cos(turn), y + radius * math.sin(turn))]
    mark = ("polygon", *points, source.choice(COLOURS))
    return Figure((mark,), "How many sides?", answer, f"The polygon has {answer} sides.")


def _length(source: random.Random, answer: int) -> Figure:
    """A segment along a line of a 10 x 10 grid of units."""
    start, across = source.randint(0, 10 - answer), source.randint(0, 10)
    near, far, level = 6 + 10 * start, 6 + 10 * (start + answer), 6 + 10 * across
    ends = (near, level, far, level) if source.random() < 0.5 else (level, near, level, far)
    marks = (("grid", 6, 10, 10, _GRID), ("segment", *ends, source.choice(COLOURS)))
    return Figure(marks, "How many units long is the segment?", answer, f"The segment spans {answer} unit{'s' * (answer > 1)}.")


def _angle(source: random.Random, answer: int) -> Figure:
    """Two rays from one point, the angle between them marked with an arc."""
    start, x, y = 5 * source.randrange(72), source.randint(53, 59), source.randint(53, 59)
    marks = (("angle", x, y, 48, 18, start, start + answer, source.choice(COLOURS)),)
    return Figure(marks, "How many degrees is the angle?", answer, f"The angle measures {answer} degrees.")


def _area(source: random.Random, answer: int) -> Figure:
    """A rectangle on an 8 x 8 grid of unit squares."""
    width, height = source.choice(_RECTANGLES[answer])
    x, y = 4 + 13 * source.randint(0, 8 - width), 4 + 13 * source.randint(0, 8 - height)
    rectangle = ("rectangle", x, y, x + 13 * width, y + 13 * height, source.choice(COLOURS))
    thought = f"The rectangle is {width} by {height}, and {width} * {height} = {answer}."
    return Figure((rectangle, ("grid", 4, 13, 8, _GRID)), "How many unit squares is the area?", answer, thought)


_KINDS = {
    "dots": (range(1, 10), _dots),
    "count": (range(1, 7), _count),
    "sides": (range(3, 9), _sides),
    "length": (range(1, 10), _length),
    "angle": (range(15, 180, 15), _angle),
    "area": (tuple(_RECTANGLES), _area),
}


def _draw_circle(canvas: ImageDraw.ImageDraw, numbers: list[float], unit: float, colour: str) -> None:
    x, y, radius = numbers
    canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _draw_square(canvas: ImageDraw.ImageDraw, numbers: list[float], unit: float, colour: str) -> None:
    x, y, radius = numbers
    canvas.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _draw_triangle(canvas: ImageDraw.ImageDraw, numbers: list[float], unit: float, colour: str) -> None:
    x, y, radius = numbers
    canvas.polygon((x, y - radius, x + radius, y + radius, x - radius, y + radius), fill=colour)


def _draw_polygon(canvas: ImageDraw.ImageDraw, numbers: list[float], unit: float, colour: str) -> None:
    canvas.polygon(numbers, fill=colour)


def _draw_rectangle(canvas: ImageDraw.ImageDraw, numbers: list[float], unit: float, colour: str) -> None:
    canvas.rectangle(numbers, fill=colour)


def _draw_segment(canvas: ImageDraw.ImageDraw, numbers: list[float], unit: float, colour: str) -> None:
    canvas.line(numbers, fill=colour, width=round(4 * unit))


def _draw_grid(canvas: ImageDraw.ImageDraw, numbers: list[float], unit: float, colour: str) -> None:
    """Numbers: start, step, and the number of cells, which is scaled like the others."""
    start, step, cells = numbers[0], numbers[1], round(numbers[2] / unit)
    end = start + step * cells
    for line in range(cells + 1):
        place = start + step * line
        canvas.line((place, start, place, end), fill=colour)
        canvas.line((start, place, end, place), fill=colour)


def _draw_angle(canvas: ImageDraw.ImageDraw, numbers: list[float], unit: float, colour: str) -> None:
    x, y, ray, arc = numbers[:4]
    start, end = (value / unit for value in numbers[4:])
    for turn in (math.radians(start), math.radians(end)):
        canvas.line((x, y, x + ray * math.cos(turn), y + ray * math.sin(turn)), fill=colour, width=round(4 * unit))
    canvas.arc((x - arc, y - arc, x + arc, y + arc), start, end, fill=colour, width=round(2 * unit))


_SHAPES = {
    "circle": _draw_circle,
    "square": _draw_square,
    "triangle": _draw_triangle,
    "polygon": _draw_polygon,
    "rectangle": _draw_rectangle,
    "segment": _draw_segment,
    "grid": _draw_grid,
    "angle": _draw_angle,
}
