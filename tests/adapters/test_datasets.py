"""Published data sets convert to our rows; generated rows are verifiable and their splits disjoint."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from real_rows import shared

from rlcore import registry
from rlcore.config.sections import DatasetConfig
from rlcore.data.rows import load_rows
from rlcore.errors import ConfigError
from rlcore.rewards.geo3k import geo3k as geo3k_reward
from rlcore.rewards.math import gsm8k as gsm8k_reward
from rlcore.rewards.math import math as math_reward
from rlcore.rewards.math import math_verify
from rlcore.rewards.tagged import tagged_answer

PUBLISHED = Path(__file__).parents[3] / "shared" / "data"
KINDS = ("count", "sides", "length", "angle", "area")
published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published rows (../shared/data) are not on this machine")


def load(name, path=None, max_rows=None, **options):
    return list(load_rows(DatasetConfig(name=name, path=path and str(path), options=options, max_rows=max_rows)))


def one(tmp_path, name, **values):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(values) + "\n")
    return load(name, path)[0]


@published
@pytest.mark.parametrize(("split", "count"), [("train", 512), ("test", 128)])
def test_every_gsm8k_solution_scores_one(split, count):
    rows = load("gsm8k", PUBLISHED / "gsm8k" / f"{split}.jsonl")
    assert len(rows) == count
    for row in rows:
        assert gsm8k_reward(row.target, row.answer, row.fields, extract="strict") == 1.0, row.id
        assert "<<" not in row.target and "," not in row.answer


@published
@pytest.mark.parametrize(("split", "count"), [("train", 256), ("test", 128)])
def test_every_math_solution_scores_one(split, count):
    rows = load("math_lighteval", PUBLISHED / "MATH-lighteval" / f"{split}.jsonl")
    assert len(rows) == count
    for row in rows:
        assert math_reward(row.target, row.answer, row.fields) == 1.0, row.id
        assert set(row.fields) == {"level", "type"}


@published
@pytest.mark.parametrize(("split", "count"), [("train", 6), ("test", 1)])
def test_every_geometry3k_image_decodes(split, count):
    rows = load("geo3k", PUBLISHED / "geometry3k" / f"{split}-00000-of-00001.parquet")
    assert len(rows) == count
    for row in rows:
        (image,) = row.images
        assert image.mode == "RGB" and min(image.size) > 10
        assert [part["type"] for part in row.messages[0]["content"]] == ["image", "text"]
        right = f"<think>It is so.</think> \\boxed{{{row.answer}}}"
        for accuracy in ("math", "math_verify"):
            assert geo3k_reward(right, row.answer, row.fields, accuracy=accuracy) == pytest.approx(1.0)


def test_a_geometry3k_row_has_its_picture(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "figure.png")
    row = one(tmp_path, "geo3k", images=["figure.png"], problem="<image>Find x.", answer="3")
    assert [image.size for image in row.images] == [(30, 20)] and row.answer == "3"
    assert [part["type"] for part in row.messages[0]["content"]] == ["image", "text"]


def test_a_gsm8k_row_is_its_question_number_and_solution(tmp_path):
    row = one(tmp_path, "gsm8k", question="How much?", answer="It is 2*500=<<2*500=1000>>1000.\n#### -1,000")
    assert row.answer == "-1000"
    assert row.target == "It is 2*500=1000.\n\\boxed{-1000}"
    assert row.messages[0]["content"].startswith("How much? ") and "\\boxed{}" in row.messages[0]["content"]


def test_a_gsm8k_row_without_its_mark_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.jsonl:1: column 'answer' does not end with '#### <number>'"):
        one(tmp_path, "gsm8k", question="How much?", answer="It is 5.")


@pytest.mark.parametrize("final", ["1/2", "5:30", "3 or 4", "1.5e3", "1 000", ".", "", "12,13", "5 apples", "5\nso 5"])
def test_a_gsm8k_answer_that_would_be_cut_is_refused_by_name(tmp_path, final):
    with pytest.raises(ConfigError, match=r"train\.jsonl:1: column 'answer' does not end with '#### <number>' but with '"):
        one(tmp_path, "gsm8k", question="q", answer=f"work\n#### {final}")


def test_each_gsm8k_answer_that_was_cut_is_refused(tmp_path):
    for line in shared("cases", "gsm8k_answer_cut", "train.jsonl").read_text().splitlines():
        with pytest.raises(ConfigError, match="does not end with"):
            one(tmp_path, "gsm8k", **json.loads(line))


@pytest.mark.parametrize(("final", "answer"), [("1,000", "1000"), ("$-5.50", "-5.50"), ("7.", "7"), (" .5 ", ".5"), ("1", "1")])
def test_a_gsm8k_number_is_read_whole(tmp_path, final, answer):
    row = one(tmp_path, "gsm8k", question="q", answer=f"#### 3\nno:\n####{final}")
    assert row.answer == answer and gsm8k_reward(row.target, row.answer, {}) == 1.0


def test_every_published_answer_equals_itself_and_its_solution_scores_one():
    rows = [
        (row, reward)
        for name, folder, reward in (("math_lighteval", "MATH-lighteval", math_verify), ("gsm8k", "gsm8k", gsm8k_reward))
        for split in ("train", "test")
        for row in load(name, shared("data", folder, f"{split}.jsonl"))
    ]
    for row, reward in rows:
        assert reward(f"\\boxed{{{row.answer}}}", row.answer, row.fields) == 1.0, row.id
        assert reward(row.target, row.answer, row.fields) == 1.0, row.id
    assert len(rows) == 384 + 640


def test_a_math_answer_is_the_last_box_with_its_braces(tmp_path):
    row = one(tmp_path, "math_lighteval", problem="p", level="Level 1", type="t", solution=r"\boxed{1}, \boxed{\frac{1}{2}}.")
    assert row.answer == r"\frac{1}{2}" and row.fields == {"level": "Level 1", "type": "t"}


@pytest.mark.parametrize("solution", ["no box", r"\boxed{never closed", r"\boxed{}", r"\boxed{ }"])
def test_a_math_solution_without_a_box_is_named(tmp_path, solution):
    with pytest.raises(ConfigError, match=r"train\.jsonl:1: column 'solution' holds no"):
        one(tmp_path, "math_lighteval", problem="p", level="1", type="t", solution=solution)


@pytest.mark.parametrize("name", ["gsm8k", "math_lighteval", "geo3k"])
def test_a_published_set_with_other_columns_is_named(tmp_path, name):
    with pytest.raises(ConfigError, match=r"train\.jsonl:1: no column '\w+' among text"):
        one(tmp_path, name, text="x")


@pytest.mark.parametrize("name", ["geometry_figures", "arithmetic"])
def test_a_generated_row_depends_on_seed_split_and_index_only(name):
    long, short = load(name, count=30, seed=4), load(name, count=10, seed=4)
    assert long[:10] == short != load(name, count=10, seed=5)
    assert len({row.id for row in long}) == 30


@pytest.mark.parametrize("name", ["geometry_figures", "arithmetic"])
def test_a_generated_set_refuses_a_path_and_a_wrong_option(name):
    with pytest.raises(ConfigError, match=r"here: .* makes its own rows; remove the path"):
        load(name, "here")
    with pytest.raises(ConfigError, match=r"data\.train\.options\.splt: no such setting; did you mean 'split'\?"):
        load(name, splt="test")
    with pytest.raises(ConfigError, match=r"data\.train\.options\.split: .*'train' or 'test'; it is 'dev'"):
        load(name, split="dev")


@pytest.mark.parametrize("kind", KINDS)
def test_no_figure_is_in_both_splits(kind):
    def pixels(split, seed):
        return {row.images[0].tobytes() for row in load("geometry_figures", split=split, seed=seed, count=400, kinds=[kind])}

    assert not pixels("train", 0) & pixels("test", 0)
    assert not pixels("train", 1) & pixels("test", 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_constant_guess_scores_low(kind, split):
    rows = load("geometry_figures", split=split, count=1000, kinds=[kind])
    assert max(Counter(row.answer for row in rows).values()) < 230
    assert all(int(row.answer) > 0 and row.fields == {"kind": kind} for row in rows)


def test_a_figure_is_a_small_picture_before_a_short_question():
    for row in load("geometry_figures", count=20, size=140, instruction="Reply with a number."):
        (image,) = row.images
        assert image.mode == "RGB" and image.size == (140, 140) and len(image.getcolors()) >= 2
        first, question = row.messages[0]["content"]
        assert first == {"type": "image"} and question["text"].endswith("? Reply with a number.")


@pytest.mark.parametrize(("answer_format", "reward"), [("tag", tagged_answer), ("boxed", math_reward)])
def test_a_figures_target_earns_the_whole_reward(answer_format, reward):
    for row in load("geometry_figures", count=50, answer_format=answer_format):
        assert reward(row.target, row.answer, row.fields) == 1.0


def test_a_small_picture_or_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match=r"options\.size: .*112; it is 56"):
        load("geometry_figures", size=56)
    with pytest.raises(ConfigError, match=r"options\.kinds\.0: "):
        load("geometry_figures", kinds=["lenght"])


def test_arithmetic_is_right_and_its_splits_share_no_problem_in_any_order():
    options = {"count": 400, "operations": ["+", "-", "*"], "max_value": 12}
    splits = [load("arithmetic", split=split, **options) for split in ("train", "test")]
    problems = []
    for rows in splits:
        asked = [row.messages[0]["content"].removeprefix("What is ").partition("?")[0] for row in rows]
        assert [str(eval(problem)) for problem in asked] == [row.answer for row in rows] == [row.target for row in rows]
        problems.append({frozenset(Counter(problem.split()).items()) for problem in asked})
    assert not problems[0] & problems[1]


def test_every_registered_data_set_imports():
    for name in registry.names("datasets"):
        assert callable(registry.load("datasets", name))
