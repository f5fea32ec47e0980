"""Robo2VLM: what the model reads and what it must answer, from every form that choices and answers come in."""

from __future__ import annotations

import io
import json

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from rlcore.config.sections import DatasetConfig
from rlcore.data.prepare.prepare import prepare
from rlcore.data.rows import load_rows
from rlcore.errors import ConfigError
from rlcore.rewards.choice import choice
from rlcore.rewards.robo2vlm import robo2vlm


def png(colour):
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


ROW = {"id": "7", "question": "Is it open?", "choices": ["Yes", "No", "Perhaps"], "correct_answer": "B", "image": png("red")}


def table(file, *rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist([{**ROW, **row} for row in rows]), file, row_group_size=2)


def load(path, **options):
    return list(load_rows(DatasetConfig(name="robo2vlm", path=str(path), options=options)))


def one(tmp_path, **values):
    table(tmp_path / "rows.parquet", values)
    return load(tmp_path / "rows.parquet")[0]


def test_a_row_is_its_image_then_question_and_choices_and_the_right_line(tmp_path):
    row = one(tmp_path)
    text = "Is it open?\nChoices:\nA. Yes\nB. No\nC. Perhaps\n"
    assert row.messages == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    assert row.answer == row.target == "B. No"
    assert row.fields == {"id": "7", "choices": ["Yes", "No", "Perhaps"]}
    assert [image.getpixel((0, 0)) for image in row.images] == [(255, 0, 0)]
    assert robo2vlm(row.target, row.answer, row.fields) == choice("b", row.answer, row.fields) == 1.0


@pytest.mark.parametrize(
    ("answer", "right"),
    [("A", "A. Yes"), ("c", "C. Perhaps"), (" B ", "B. No"), (0, "A. Yes"), (2, "C. Perhaps"), (1.0, "B. No"), ("1", "B. No")],
)
def test_the_answer_is_a_letter_or_an_index_from_0(tmp_path, answer, right):
    assert one(tmp_path, correct_answer=answer).answer == right


@pytest.mark.parametrize("choices", ["['Yes', 'No', 'Perhaps']", '("Yes", "No", "Perhaps")', ["Yes", "No", "Perhaps"]])
def test_choices_are_a_list_or_pythons_text_of_one(tmp_path, choices):
    assert one(tmp_path, choices=choices).fields["choices"] == ["Yes", "No", "Perhaps"]


def test_more_than_five_choices_have_letters_too(tmp_path):
    row = one(tmp_path, choices=[str(10 * i) for i in range(26)], correct_answer="Z")
    assert row.answer == "Z. 250" and "\nF. 50\n" in row.messages[0]["content"][1]["text"]
    assert one(tmp_path, choices=[str(10 * i) for i in range(9)], correct_answer=8).answer == "I. 80"


@pytest.mark.parametrize("answer", ["D", "d", 3, -1, "-1", "AB", "Yes", "é", 1.5, "3"])
def test_an_answer_outside_the_choices_names_the_row(tmp_path, answer):
    table(tmp_path / "rows.parquet", *[{"correct_answer": str(value)} for value in ("A", answer)])
    message = r"rows\.parquet row 2: column 'correct_answer' holds '.*'; the answer is a letter, A to C, or an index, 0 to 2"
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("Yes or No", r"column 'choices' holds 'Yes or No'; it is a list of choices"),
        ("['Yes' 'No']", r"column 'choices' holds 1 choices; a question has 2 to 26"),  # NumPy's text, which Python joins
        ("[]", r"holds 0 choices"),
        (str(list(range(27))), r"holds 27 choices"),
        ("['Yes', None]", r"holds 'None' as choice 2 of 2"),
        (None, r"column 'choices' holds 'None'; it is a list"),
        ("__import__('os').system('touch planted')", r"it is a list of choices"),
    ],
)
def test_choices_that_are_none_name_the_row(tmp_path, choices, message):
    with pytest.raises(ConfigError, match=rf"rows\.parquet row 1: .*{message}"):
        one(tmp_path, choices=choices)
    assert not (tmp_path / "planted").exists()


def test_a_placeholder_in_the_question_is_text(tmp_path):
    row = one(tmp_path, question="What does <image> mean?")
    assert row.messages[0]["content"][1]["text"].startswith("What does <image> mean?\n")
    table(tmp_path / "in" / "train.parquet", {}, {"question": "What does <image> mean?"}, {})
    (count,) = prepare("robo2vlm", str(tmp_path / "in"), tmp_path / "out")
    assert list(count.dropped) == ["placeholders"] and "row 2: <image> in the question" in count.dropped["placeholders"].first


def test_columns_are_renamed_and_several_hold_images(tmp_path):
    values = {"q": "Which?", "options": "['left', 'right']", "gold": 1}
    values |= {"front": png("red"), "wrist": [png("blue")], "none": None}
    (tmp_path / "rows").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([values]), tmp_path / "rows" / "x.parquet")
    names = {"question": "q", "choices": "options", "answer": "gold", "images": ["front", "wrist", "none"]}
    (row,) = load(tmp_path / "rows", **names, instruction="Answer with a letter.")
    assert [image.getpixel((0, 0)) for image in row.images] == [(255, 0, 0), (0, 0, 255)]
    assert row.messages[0]["content"][2]["text"] == "Which?\nChoices:\nA. left\nB. right\nAnswer with a letter."
    assert row.answer == "B. right" and row.fields == {"choices": ["left", "right"]}
    with pytest.raises(ConfigError, match=r"x\.parquet row 1: no column 'gol' among .*did you mean 'gold'"):
        load(tmp_path / "rows", **names | {"answer": "gol"})


def test_the_published_folder_is_read_a_split_at_a_time_and_every_row_is_its_own(tmp_path):
    for i in range(2):
        rows = [{"question": f"train {i} {j}?", "correct_answer": "ABC"[j % 3]} for j in range(5)]
        table(tmp_path / "data" / f"train-{i:05}-of-00002.parquet", *rows)
    table(tmp_path / "data" / "test-00000-of-00001.parquet", {"question": "test?"})
    with pytest.raises(ConfigError, match=r"holds the splits train and test; say which with the option split"):
        load(tmp_path)
    rows = load(tmp_path, split="train")
    asked = [row.messages[0]["content"][1]["text"].partition("?")[0] for row in rows]
    assert asked == [f"train {i} {j}" for i in range(2) for j in range(5)]  # whatever row group they stand in
    assert [row.answer[0] for row in rows] == list("ABCAB") * 2
    assert len(load(tmp_path, split="test")) == 1


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("gsm8k", {"question": "1+1?", "answer": "#### 2"}),
        ("math_lighteval", {"problem": "1+1?", "solution": r"\boxed{2}"}),
        ("geo3k", {"problem": "Find x.", "images": [], "answer": "2"}),
    ],
)
def test_the_other_published_sets_choose_a_split_alike(tmp_path, name, values):
    for split, count in (("train", 2), ("test", 1)):
        (tmp_path / f"{split}.jsonl").write_text((json.dumps(values) + "\n") * count)
    with pytest.raises(ConfigError, match=r"holds the splits train and test"):
        load_rows(DatasetConfig(name=name, path=str(tmp_path)))
    for split, count in (("train", 2), ("test", 1)):
        assert len(load_rows(DatasetConfig(name=name, path=str(tmp_path), options={"split": split}))) == count


def test_a_prepared_row_with_an_answer_outside_its_choices_is_left_out_by_name(tmp_path):
    table(tmp_path / "in" / "test-00000-of-00001.parquet", {}, {"correct_answer": "D"}, {"correct_answer": None}, {}, {})
    (count,) = prepare("robo2vlm", str(tmp_path / "in"), tmp_path / "out", "verl")
    assert {reason: (one.count, one.first[:39]) for reason, one in count.dropped.items()} == {
        "answer-outside-choices": (1, "test-00000-of-00001.parquet row 2: colu"),
        "no-answer": (1, "test-00000-of-00001.parquet row 3: colu"),
    }
