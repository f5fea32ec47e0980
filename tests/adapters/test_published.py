"""Layouts of other toolkits: each row as their own scripts write it, and what was published reads back from ours."""

from __future__ import annotations

import base64
import io
import json
import re

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from real_rows import shared

from rlcore.config.sections import DatasetConfig
from rlcore.data.prepare.prepare import prepare
from rlcore.data.rows import load_rows

THINK = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The reasoning"
    " process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."
)
MATH = {
    "problem": "What is $\\frac{1}{2}$ of 3?", "level": "Level 1", "type": "Algebra",
    "solution": "\\boxed{3}? No: $\\boxed{\\frac{3}{2}}$.",
}  # fmt: skip
GSM8K = {"question": "How far is 1,000 × 2?", "answer": "It is 2*1000=<<2*1000=2000>>2000.\n#### -2,000"}
TEXT = pyarrow.string()
GRADED = {
    "ability": TEXT,
    "reward_model": pyarrow.struct({"style": TEXT, "ground_truth": TEXT}),
    "extra_info": pyarrow.struct({"split": TEXT, "index": pyarrow.int64(), "answer": TEXT, "question": TEXT}),
}
PROMPT = pyarrow.list_(pyarrow.struct({"role": TEXT, "content": TEXT}))
IMAGES = pyarrow.list_(pyarrow.struct({"bytes": pyarrow.binary(), "path": TEXT}))


def picture(colour, kind="PNG", mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, (8, 6), colour).save(stream, kind)
    return stream.getvalue()


RED, CLEAR = picture("red"), picture((0, 0, 0, 0), mode="RGBA")
GEO3K = [
    {"images": [{"bytes": RED, "path": "a.png"}], "problem": "<image>Find $x$.", "answer": "5 \\sqrt { 3 }"},
    {"images": [{"bytes": one, "path": None} for one in (CLEAR, RED)], "problem": "In <image> and <image>?", "answer": "2"},
]
ROBO = {
    "id": "r1", "question": "Is it open?", "choices": "['Yes', \"No, it isn't\"]", "correct_answer": "B",
    "image": {"bytes": RED, "path": None},
}  # fmt: skip


def published(folder, name, rows):
    """A published data set of one train and one test split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        if name in ("geo3k", "robo2vlm"):
            parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
        else:
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def written(tmp_path):
    """Prepare a data set of these rows; the folder it was written to."""

    def run(name, layout, *rows):
        prepare(name, published(tmp_path / "in" / name, name, rows), tmp_path / layout / name, layout)
        return tmp_path / layout / name

    return run


def read(file):
    table = parquet.ParquetFile(file)
    return table.schema_arrow, table.read().to_pylist()


def test_chatlearns_math_is_this_line(written):
    folder = written("math-lighteval", "chatlearn", MATH)
    assert (folder / "train.json").read_text(encoding="utf-8") == (
        '{"data_source": "DigitalLearningGmbH/MATH-lighteval", "prompt": [{"role": "user", "content": "What is'
        ' $\\\\frac{1}{2}$ of 3? Let\'s think step by step and output the final answer within \\\\boxed{}."}], "ability":'
        ' "math", "reward_model": {"style": "rule", "ground_truth": "\\\\frac{3}{2}"},'
        ' "extra_info": {"split": "train", "index": 0}}\n'
    )
    assert json.loads((folder / "test.json").read_text())["extra_info"] == {"split": "test", "index": 0}
    assert sorted(path.name for path in folder.iterdir() if path.suffix) == ["test.json", "train.json"]


def test_chatlearns_gsm8k_is_this_line(written):
    assert (written("gsm8k", "chatlearn", GSM8K) / "test.json").read_text(encoding="utf-8") == (
        '{"data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": "How far is 1,000 × 2? Let\'s think step by'
        ' step and output the final answer within \\\\boxed{}."}], "ability": "math", "reward_model": {"style": "rule",'
        ' "ground_truth": "-2000"}, "extra_info": {"split": "test", "index": 0, "answer": "It is 2*1000=<<2*1000=2000>>2000.'
        '\\n#### -2,000", "question": "How far is 1,000 × 2?"}}\n'
    )


def test_chatlearns_geo3k_has_its_images_as_jpeg_before_the_text(written):
    schema, rows = read(written("geo3k", "chatlearn", *GEO3K) / "train.parquet")
    part = pyarrow.struct({"type": TEXT, "image_url": TEXT, "text": TEXT})
    messages = pyarrow.list_(pyarrow.struct({"role": TEXT, "content": pyarrow.list_(part)}))
    assert schema.remove_metadata() == pyarrow.schema({"data_source": TEXT, "messages": messages, **GRADED})
    colours = []
    for row in rows:
        for place in row["messages"][0]["content"][:-1]:
            head, _, content = place["image_url"].partition(",")
            image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
            assert (head, image.format, image.mode, image.size) == ("data:image;base64", "JPEG", "RGB", (8, 6))
            assert {step for table in image.quantization.values() for step in table} == {1}, "quality 100"
            colours.append(image.getpixel((4, 3)))
            place["image_url"] = "URL"
    assert colours == [(254, 0, 0), (255, 255, 255), (254, 0, 0)]
    url, text = {"type": "image_url", "image_url": "URL", "text": None}, {"type": "text", "image_url": None}
    assert rows == [
        {
            "data_source": "hiyouga/geometry3k",
            "messages": [{"role": "user", "content": [url, {**text, "text": f"Find $x$. {THINK}"}]}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "5 \\sqrt { 3 }"},
            "extra_info": {"split": "train", "index": 0, "answer": "5 \\sqrt { 3 }", "question": "<image>Find $x$."},
        },
        {
            "data_source": "hiyouga/geometry3k",
            "messages": [{"role": "user", "content": [url, url, {**text, "text": f"In  and ? {THINK}"}]}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"split": "train", "index": 1, "answer": "2", "question": "In <image> and <image>?"},
        },
    ]


@pytest.mark.parametrize("layout", ["mindspeed", "verl"])
def test_mindspeeds_and_verls_geo3k_keep_the_placeholders_and_the_bytes(written, layout):
    schema, rows = read(written("geo3k", layout, *GEO3K) / "test.parquet")
    assert schema.remove_metadata() == pyarrow.schema({"data_source": TEXT, "prompt": PROMPT, "images": IMAGES, **GRADED})
    assert json.loads(schema.metadata[b"huggingface"]) == {
        "info": {"features": {"images": {"feature": {"_type": "Image"}, "_type": "Sequence"}}}
    }
    assert rows[0] == {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": f"<image>Find $x$. {THINK}"}],
        "images": [{"bytes": RED, "path": "a.png"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "5 \\sqrt { 3 }"},
        "extra_info": {"split": "test", "index": 0, "answer": "5 \\sqrt { 3 }", "question": "<image>Find $x$."},
    }
    assert rows[1]["prompt"][0]["content"] == f"In <image> and <image>? {THINK}" and rows[1]["images"] == GEO3K[1]["images"]


@pytest.mark.parametrize(
    ("layout", "asked"),
    [
        ("verl", 'Let\'s think step by step and output the final answer after "####".'),
        ("mindspeed", "Let's think step by step and output the final answer within \\boxed{}."),
    ],
)
def test_text_in_verls_columns(written, layout, asked):
    schema, rows = read(written("gsm8k", layout, GSM8K) / "train.parquet")
    assert schema == pyarrow.schema({"data_source": TEXT, "prompt": PROMPT, **GRADED})
    assert rows == [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"How far is 1,000 × 2? {asked}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "-2000"},
            "extra_info": {"split": "train", "index": 0, "answer": GSM8K["answer"], "question": GSM8K["question"]},
        }
    ]
    _, (math,) = read(written("math-lighteval", layout, MATH) / "train.parquet")
    assert math["prompt"][0]["content"].endswith("of 3? Let's think step by step and output the final answer within \\boxed{}.")
    assert math["extra_info"] == {"split": "train", "index": 0, "answer": MATH["solution"], "question": MATH["problem"]}


def test_robo2vlm_in_each_layout(written):
    asked = "Is it open?\nChoices:\nA. Yes\nB. No, it isn't\n"
    graded = {
        "ability": "vqa",
        "reward_model": {"style": "rule", "ground_truth": "B. No, it isn't"},
        "extra_info": {"split": "train", "index": 0, "answer": "B. No, it isn't", "question": "Is it open?"},
    }
    for layout in ("verl", "mindspeed"):
        _, (row,) = read(written("robo2vlm", layout, ROBO) / "train.parquet")
        prompt = [{"role": "user", "content": f"<image>{asked}"}]
        assert row == {"data_source": "keplerccc/Robo2VLM-1", "prompt": prompt, "images": [ROBO["image"]], **graded}
    _, (row,) = read(written("robo2vlm", "chatlearn", ROBO) / "train.parquet")
    assert {name: value for name, value in row.items() if name in graded} == graded
    image, words = row["messages"][0]["content"]
    assert image["type"] == "image_url" and words == {"type": "text", "image_url": None, "text": asked}


def load(name, path, **options):
    return list(load_rows(DatasetConfig(name=name, path=str(path), options=options)))


def content(row):
    """A row, its images as pixels."""
    pixels = [image.tobytes() for image in row.images]
    return row.id.rpartition(":")[2], row.messages, row.answer, row.target, pixels, row.fields


ALL = [
    ("gsm8k", "gsm8k", [GSM8K, {**GSM8K, "mine": 1}]), ("math-lighteval", "math_lighteval", [MATH]), ("geo3k", "geo3k", GEO3K),
    ("robo2vlm", "robo2vlm", [ROBO, {**ROBO, "correct_answer": "a", "id": None}]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data_set", "rows"), ALL)
def test_our_layout_reads_as_the_published_data_set_does(written, tmp_path, name, data_set, rows):
    folder = written(name, "ours", *rows)
    (file,) = folder.glob("train.*")
    ours, direct = load(data_set, file), load(data_set, tmp_path / "in" / name, split="train")
    assert [content(row) for row in ours] == [content(row) for row in direct] and len(ours) == len(rows)
    assert [content(row) for row in load(data_set, folder, split="test")] == [content(row) for row in ours]


@pytest.mark.parametrize("layout", ["chatlearn", "mindspeed", "verl"])
@pytest.mark.parametrize(("name", "data_set", "rows"), ALL)
def test_the_other_layouts_have_the_same_answers_and_images(written, tmp_path, layout, name, data_set, rows):
    (file,) = written(name, layout, *rows).glob("train.*")
    theirs, direct = load("verl", file), load(data_set, tmp_path / "in" / name, split="train")
    assert [row.answer for row in theirs] == [row.answer for row in direct]
    assert [[image.size for image in row.images] for row in theirs] == [[image.size for image in row.images] for row in direct]
    for mine, other in zip(direct, theirs, strict=True):
        asked = [message["content"] for row in (mine, other) for message in row.messages]
        kinds = [[part["type"] for part in parts] if isinstance(parts, list) else "text" for parts in asked]
        assert kinds[0] == kinds[1] or (layout == "chatlearn" and len(mine.images) == 2)  # which puts images before the text


def test_our_layout_has_the_published_columns_and_bytes(written):
    (line,) = (written("math-lighteval", "ours", MATH) / "test.jsonl").read_text().splitlines()
    assert json.loads(line) == MATH
    schema, rows = read(written("geo3k", "ours", *GEO3K) / "test.parquet")
    assert schema.remove_metadata() == pyarrow.schema({"images": IMAGES, "problem": TEXT, "answer": TEXT}) and rows == GEO3K
    schema, (row,) = read(written("robo2vlm", "ours", ROBO) / "train.parquet")
    assert row == {**ROBO, "choices": ["Yes", "No, it isn't"]}
    assert json.loads(schema.metadata[b"huggingface"])["info"]["features"] == {"image": {"_type": "Image"}}


def test_images_from_paths_are_stored_in_the_files(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(RED)
    row = {"images": ["a.png"], "problem": "Find x.", "answer": "1"}
    (tmp_path / "in" / "train.jsonl").write_text(json.dumps(row) + "\n")
    prepare("geo3k", str(tmp_path / "in"), tmp_path / "out", "verl")
    _, (written,) = read(tmp_path / "out" / "train.parquet")
    assert written["images"] == [{"bytes": RED, "path": None}]
    assert written["prompt"][0]["content"] == f"<image>Find x. {THINK}"


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        ({"images": [{"bytes": RED[:50], "path": None}]}, "unreadable-image", "row 2: the image cannot be decoded"),
        ({"images": [{"bytes": b"text", "path": None}]}, "unreadable-image", "the image cannot be opened"),
        ({"images": [{"bytes": None, "path": "gone.png"}]}, "unreadable-image", "the image cannot be read: .*gone.png"),
        ({"images": []}, "no-image", "column 'images' holds no image"),
        ({"images": None}, "no-image", "column 'images' holds no image"),
        ({"problem": "<image> <image>?"}, "placeholders", "2 <image> placeholders for 1 images; there must be one an image"),
        ({"answer": None}, "no-answer", "column 'answer' is empty"),
        ({"problem": ""}, "no-question", "column 'problem' is empty"),
    ],
)
def test_an_unusable_geo3k_row_is_named(tmp_path, change, reason, message):
    rows = [GEO3K[0], {**GEO3K[0], **change}, GEO3K[0]]
    counts = prepare("geo3k", published(tmp_path / "in", "geo3k", rows), tmp_path / "out", "mindspeed")
    for count in counts:
        assert count.kept == 2 and list(count.dropped) == [reason]
        assert re.search(message, count.dropped[reason].first) and " row 2: " in count.dropped[reason].first


@pytest.mark.parametrize("layout", ["ours", "chatlearn", "mindspeed", "verl"])
@pytest.mark.parametrize(("name", "folder", "counts"), [
    ("gsm8k", "gsm8k", [512, 128]), ("math-lighteval", "MATH-lighteval", [256, 128]), ("geo3k", "geometry3k", [6, 1]),
])  # fmt: skip
def test_every_real_row_is_kept_in_every_layout(tmp_path, layout, name, folder, counts):
    found = prepare(name, str(shared("data", folder)), tmp_path / "out", layout)
    assert [(count.split, count.kept, count.lost) for count in found] == [("train", counts[0], 0), ("test", counts[1], 0)]
