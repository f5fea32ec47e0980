"""Writes the rows of the recipes' tiny variants: small tasks of our own in the columns of the published data sets.

    .venv/bin/python ci/make_rows.py        # into examples/recipes/rows
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow
from pyarrow import parquet

from rlcore.config.sections import DatasetConfig
from rlcore.data.rows import load_rows

FOLDER = Path(__file__).parents[1] / "examples" / "recipes" / "rows"
COUNTS = {"train": 64, "test": 16}
IMAGE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})


def main() -> None:
    for split, count in COUNTS.items():
        for name, make, schema in (("geo3k", geo3k, GEO3K), ("robo2vlm", robo2vlm, ROBO2VLM)):
            rows = [make(row) for row in figures(split, count)]
            path = folder(name) / f"{split}-00000-of-00001.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, row_group_size=100)
        lines = [json.dumps(math(row)) + "\n" for row in generated("arithmetic", split, count, max_value=20)]
        (folder("math") / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


GEO3K = pyarrow.schema({"images": pyarrow.list_(IMAGE), "problem": pyarrow.string(), "answer": pyarrow.string()})
ROBO2VLM = pyarrow.schema({
    "id": pyarrow.string(), "question": pyarrow.string(), "choices": pyarrow.string(), "correct_answer": pyarrow.int64(),
    "image": IMAGE,
})  # fmt: skip


def geo3k(row):
    return {"images": [png(row.images[0])], "problem": "<image>How many circles?", "answer": row.answer}


def robo2vlm(row):
    choices = [str(number) for number in range(1, 6)]
    return {
        "id": row.id, "question": "How many circles?", "choices": str(choices), "correct_answer": choices.index(row.answer),
        "image": png(row.images[0]),
    }  # fmt: skip


def math(row):
    problem = row.messages[-1]["content"].strip()
    return {
        "problem": problem, "level": f"Level {1 + len(row.answer)}", "type": "Prealgebra",
        "solution": f"The result is $\\boxed{{{row.answer}}}$.",
    }  # fmt: skip


def figures(split, count):
    return generated("geometry_figures", split, count, kinds=["dots"], largest=5)


def generated(name, split, count, **options):
    options = {"split": split, "count": count, "instruction": "", **options}
    return load_rows(DatasetConfig(name=name, options=options))


def png(image):
    stream = io.BytesIO()
    image.quantize(16).save(stream, "PNG", optimize=True)
    return {"bytes": stream.getvalue(), "path": None}


def folder(name):
    path = FOLDER / name
    path.mkdir(parents=True, exist_ok=True)
    return path


if __name__ == "__main__":
    main()
