"""The row layout of verl and its kin."""

from __future__ import annotations

import base64
import io
import json

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from rlcore.config.sections import DatasetConfig
from rlcore.data.rows import load_rows
from rlcore.errors import ConfigError

ASKED = "<image>How long is x? Think."
GRADED = {
    "ability": "math", "reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"split": "train", "index": 0},
}  # fmt: skip


def picture():
    stream = io.BytesIO()
    Image.effect_noise((60, 40), 80).convert("RGB").save(stream, "PNG")
    return stream.getvalue()


def load(path, **options):
    return list(load_rows(DatasetConfig(name="verl", path=str(path), options=options)))


def test_prompts_and_messages_images_beside_them_and_inside_give_the_same_rows(tmp_path):
    data = picture()
    url = f"data:image;base64,{base64.b64encode(data).decode()}"
    beside = {"prompt": [{"role": "user", "content": ASKED}], "images": [{"bytes": data, "path": None}]}
    parts = [
        {"type": "image_url", "image_url": url, "text": None},
        {"type": "text", "image_url": None, "text": ASKED.removeprefix("<image>")},
    ]
    inside = {"messages": [{"role": "user", "content": parts}]}
    found = []
    for number, one in enumerate((beside, inside)):
        row = {"data_source": "hiyouga/geometry3k", **one, **GRADED}
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"{number}.parquet")
        found += load(tmp_path / f"{number}.parquet")
    first, second = found
    assert first.messages == second.messages and first.images[0].tobytes() == second.images[0].tobytes()
    assert first.answer == second.answer == "4" and first.source == "hiyouga/geometry3k"
    assert first.fields["extra_info"] == {"split": "train", "index": 0} and "images" not in first.fields


def test_text_rows_as_json_lines_and_options_for_other_columns(tmp_path):
    row = {"data_source": "a", "prompt": [{"role": "user", "content": "1+1?"}], **GRADED, "solution": "It is 4."}
    (tmp_path / "rows.json").write_text(json.dumps(row))
    (found,) = load(tmp_path / "rows.json", target="solution", answer="extra_info.index", source="ability")
    assert (found.target, found.answer, found.source) == ("It is 4.", "0", "math")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"data_source": "a", **GRADED}, "no column 'prompt' among data_source, ability"),
        ({"data_source": "a", "prompt": "x"}, "no column 'reward_model.ground_truth' among data_source, prompt"),
        ({"data_source": "a", "prompt": "x", "reward_model": {"style": "rule"}}, "no field 'ground_truth' in the column 'rew"),
        ({"data_source": "a", "prompt": "x", "reward_model": {"ground_truth": None}}, "column 'reward_model.*' is empty"),
        ({"prompt": "x", **GRADED}, "no column 'data_source'"),
        ({"data_source": "a", "prompt": "x", "videos": ["a.mp4"], **GRADED}, "the row has videos, which are not read"),
        ({"data_source": "a", "prompt": "<image>x", "images": [], **GRADED}, "has no image for it"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(row, message, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=rf"^rows\.jsonl:1: .*{message}"):
        load(tmp_path / "rows.jsonl")
