"""`rlcore data`: every split of every form, whole or not at all, with each row that is left out counted and named."""

from __future__ import annotations

import io
import json
import os
import tracemalloc

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from test_splits import saved

from rlcore import registry
from rlcore.cli.main import main
from rlcore.data.prepare import output
from rlcore.data.prepare.output import OutputFolder, ParquetRows, row_file
from rlcore.data.prepare.preparation import Layout
from rlcore.data.prepare.prepare import prepare
from rlcore.errors import ConfigError, RunError

GOOD = {"question": "1+1?", "answer": "It is 2.\n#### 2"}


def png(colour="red"):
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(stream, "PNG")
    return stream.getvalue()


def jsonl(file, *rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "in"
    jsonl(folder / "train.jsonl", *[{**GOOD, "level": i} for i in range(3)])
    jsonl(folder / "test.jsonl", GOOD)
    return folder


@pytest.fixture
def data(tmp_path, capsys):
    """Run the command; returns its status, stdout and stderr."""

    def run(name="gsm8k", source=tmp_path / "in", folder=tmp_path / "out", *rest):
        capsys.readouterr()
        status = main(["data", name, "--input", str(source), "--output", str(folder), *rest])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def refused(result, folder):
    """The error of a command that wrote nothing."""
    status, said, error = result
    assert (status, said) == (2, "") and error.startswith("rlcore: ") and not folder.exists()
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    return error


def test_every_split_is_written_and_counted(source, data, tmp_path):
    jsonl(source / "validation.jsonl", GOOD, GOOD)
    status, said, error = data()
    assert (status, error) == (0, "")
    out = tmp_path / "out"
    counts = {"train": "3 rows", "test": "1 row", "validation": "2 rows"}
    assert said.splitlines() == [f"{split}: {count} -> {out}/{split}.jsonl" for split, count in counts.items()]
    assert [json.loads(line)["level"] for line in (out / "train.jsonl").open()] == [0, 1, 2]


def test_the_same_rows_come_of_every_published_form(source, tmp_path):
    rows = {split: [json.loads(line) for line in (source / f"{split}.jsonl").open()] for split in ("train", "test")}
    for split, values in rows.items():
        table = pyarrow.Table.from_pylist(values)
        (tmp_path / "hub" / "main").mkdir(parents=True, exist_ok=True)
        for i in range(len(values)):
            shard = tmp_path / "hub" / "main" / f"{split}-{i:05}-of-{len(values):05}.parquet"
            parquet.write_table(table.slice(i, 1), shard)
        (tmp_path / "saved" / split).mkdir(parents=True)
        for i in range(len(values)):
            with pyarrow.ipc.new_stream(tmp_path / "saved" / split / f"data-{i}.arrow", table.schema) as stream:
                stream.write_table(table.slice(i, 1))
        (tmp_path / "list").mkdir(exist_ok=True)
        (tmp_path / "list" / f"{split}.json").write_text(json.dumps(values))
    saved(tmp_path / "saved")
    written = set()
    for form in (source, tmp_path / "hub", tmp_path / "hub" / "main", tmp_path / "saved", tmp_path / "list"):
        prepare("gsm8k", str(form), out := tmp_path / "out" / form.name)
        written.add(((out / "train.jsonl").read_text(), (out / "test.jsonl").read_text()))
    assert len(written) == 1


BAD = [  # what is wrong with a row, its reason, and what is said of it
    ({"answer": "none"}, "no-answer", "column 'answer' does not end with '#### <number>' but with 'none'"),
    ({"answer": None}, "no-answer", "column 'answer' is empty; fill it or remove the row"),
    ({"answer": " "}, "no-answer", "column 'answer' is empty"),
    ({"answer": ["#### 2"]}, "no-answer", "column 'answer' holds a list; it must be a text or a number"),
    ({"question": None}, "no-question", "column 'question' is empty"),
]


@pytest.mark.parametrize(("change", "reason", "message"), BAD)
def test_an_unusable_row_is_left_out_counted_and_named(tmp_path, data, change, reason, message):
    jsonl(tmp_path / "in" / "train.jsonl", GOOD, {**GOOD, **change}, GOOD, {**GOOD, **change}, GOOD)
    status, said, _ = data()
    assert status == 0 and len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 3
    first, line = said.splitlines()
    assert first.startswith("train: 3 rows -> ")
    assert line.startswith(f"    2 rows are left out: {reason}; the first is train.jsonl:2: {message}")


def test_more_than_half_left_out_is_an_error_unless_asked_for(tmp_path, data):
    jsonl(tmp_path / "in" / "train.jsonl", *[{**GOOD, "answer": "none"}] * 3, {**GOOD, "question": ""}, GOOD, GOOD, GOOD)
    error = refused(data(), tmp_path / "out")
    assert "train: 4 of 7 rows are left out: no-answer 3 (first: train.jsonl:1: column 'answer' does not end" in error
    assert "no-question 1 (first: train.jsonl:4: " in error
    assert error.endswith("or leave such rows out with --drop no-answer --drop no-question\n")
    status, said, _ = data("gsm8k", tmp_path / "in", tmp_path / "out", "--drop", "no-answer")
    assert status == 0 and said.startswith("train: 3 rows -> ")


def test_half_left_out_is_none_too_many(tmp_path, data):
    jsonl(tmp_path / "in" / "train.jsonl", GOOD, {**GOOD, "answer": "none"})
    assert data()[0] == 0


def test_a_split_without_a_row_left_has_no_file_and_no_row_at_all_is_an_error(source, data, tmp_path):
    jsonl(source / "test.jsonl", {**GOOD, "answer": "hidden"})
    assert "test: 1 of 1 rows are left out" in refused(data(), tmp_path / "out")
    status, said, _ = data("gsm8k", source, tmp_path / "out", "--drop", "no-answer")
    assert status == 0 and "test: 0 rows are left, so no file is written" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".rlcore-data", "train.jsonl"]
    jsonl(source / "train.jsonl", {**GOOD, "answer": "hidden"})
    error = refused(data("gsm8k", source, tmp_path / "other", "--drop", "no-answer"), tmp_path / "other")
    assert "no row is usable: train: 1 of 1 rows are left out: no-answer 1 (first: train.jsonl:1: " in error


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("gsm8k", [{"questions": "q", "answer": "#### 1"}], "train.jsonl:1: no column 'question' among questions, answer; did"),
        ("gsm8k", [GOOD, {"question": "q"}], "train.jsonl:2: no column 'answer' among question"),
        ("math-lighteval", [GOOD], "train.jsonl:1: no column 'problem' among question, answer"),
        ("geo3k", [{"problem": "p", "answer": "1", "image": ""}], "no column 'images' among problem, answer, image; did you"),
        ("robo2vlm", [GOOD], "train.jsonl:1: no column 'choices' among question, answer"),
    ],
)
def test_a_missing_column_ends_it_with_those_there_are(tmp_path, data, name, rows, message):
    jsonl(tmp_path / "in" / "train.jsonl", *rows)
    assert message in refused(data(name), tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jsonl": "", "b.jsonl": ""}, "no name tells a split (a.jsonl, b.jsonl); call the files train..., test..."),
        ({"train.jsonl": '{"question": \n'}, "train.jsonl:1: not valid JSON"),
        ({"train.jsonl": ""}, "train.jsonl: holds no rows"),
        ({"train.parquet": "PAR?"}, "train.parquet: not a readable parquet file"),
    ],
)
def test_a_bad_input_is_named(tmp_path, data, files, message):
    (tmp_path / "in").mkdir()
    for name, text in files.items():
        (tmp_path / "in" / name).write_text(text)
    assert message in refused(data(), tmp_path / "out")


def test_a_wrong_argument_is_named(source, data, tmp_path):
    out = tmp_path / "out"
    error = refused(data("gsm"), out)
    assert "NAME: none of the installed preparations is called 'gsm'; did you mean 'gsm8k'?" in error
    error = refused(data("gsm8k", source, out, "--layout", "chatlern"), out)
    assert "--layout: none of the installed layouts is called 'chatlern'; did you mean 'chatlearn'?" in error
    assert f"{tmp_path}/gone: no such data file or folder" in refused(data("gsm8k", tmp_path / "gone"), out)


def test_the_same_call_replaces_its_files_and_nothing_else_is_touched(source, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    assert data()[0] == 0
    jsonl(source / "test.jsonl", GOOD, GOOD)
    assert data()[0] == 0 and len((out / "test.jsonl").read_text().splitlines()) == 2
    for change, message in (
        (["--layout", "verl"], "was written from name gsm8k, input "),
        (["--drop", "no-answer"], "was written from name gsm8k, input "),
    ):
        status, _, error = data("gsm8k", source, out, *change)
        assert status == 2 and message in error and "give another folder, or empty this one" in error
    (out / "test.jsonl").write_text("mine")
    (out / "notes.txt").write_text("mine")
    status, _, error = data()
    assert status == 2 and f"notes.txt, test.jsonl in {out} changed since it was written" in error
    assert (out / "test.jsonl").read_text() == (out / "notes.txt").read_text() == "mine"


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as left:
        main(["data", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    parts = ("geo3k, gsm8k, math-lighteval, robo2vlm", "chatlearn, mindspeed, ours, verl", "HF_ENDPOINT", "--drop REASON")
    assert all(part in text for part in parts)


@pytest.mark.parametrize("record", ["", "[]", "{}", "null"])
def test_a_folder_with_a_strange_record_is_left_alone(source, data, tmp_path, record):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / output.RECORD).write_text(record)
    status, _, error = data()
    assert status == 2 and "holds files of others (.rlcore-data)" in error


def test_a_folder_of_others_and_a_file_are_left_alone(source, data, tmp_path):
    status, _, error = data("gsm8k", source, source)
    assert status == 2 and f"{source} holds files of others (test.jsonl, train.jsonl); give another folder" in error
    status, _, error = data("gsm8k", source, source / "test.jsonl")
    assert status == 2 and "test.jsonl is a file; give a folder" in error


def test_an_error_at_the_last_row_leaves_the_earlier_folder_whole(source, data, tmp_path):
    assert data()[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    jsonl(source / "test.jsonl", GOOD, {"other": 1})
    assert data()[0] == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_nothing_is_in_place_before_everything_is(source, data, tmp_path, monkeypatch):
    def interrupted(draft):
        assert not (tmp_path / "out").exists() and (draft / "train.jsonl").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "_stamps", interrupted)
    assert data()[0] == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_full_disk_is_an_error_of_the_run(source, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.JsonRows, "write", full)
    with pytest.raises(RunError, match=r"--output: .*/out cannot be written: .*No space left on device; free some room"):
        prepare("gsm8k", str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_replacement_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    folder = OutputFolder(tmp_path / "out", {"of": "this"})
    with folder.draft() as draft:
        (draft / "train.jsonl").write_text("old")
    rename = os.rename

    def fails(source, target):
        if "partial" in source.name:
            raise OSError("busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(RunError, match="busy"), folder.draft() as draft:
        (draft / "train.jsonl").write_text("new")
    assert (tmp_path / "out" / "train.jsonl").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_folder_is_as_open_as_any_that_is_made(source, tmp_path):
    prepare("gsm8k", str(source), tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_shards_that_are_not_there_are_warned_of(tmp_path, data):
    jsonl(tmp_path / "in" / "train-00000-of-00003.jsonl", GOOD)
    jsonl(tmp_path / "in" / "train-00002-of-00003.jsonl", GOOD)
    assert "train: 2 rows -> " in (said := data()[1]) and "(warning: 2 of 3 files are there)" in said


def test_rows_pass_through_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("rlcore.data.files.lines._BLOCK", 1 << 16)
    rows = 1500
    jsonl(tmp_path / "in" / "train.jsonl", *[{**GOOD, "question": f"{i} " + "x" * 4000} for i in range(rows)])
    size = (tmp_path / "in" / "train.jsonl").stat().st_size
    registry.load("preparations", "gsm8k")
    tracemalloc.start()
    (count,) = prepare("gsm8k", str(tmp_path / "in"), tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count.kept == rows and peak < size / 4, (peak, size)


def test_rows_stay_in_order_whatever_thread_converts_them(tmp_path):
    jsonl(tmp_path / "in" / "train.jsonl", *[{**GOOD, "n": i} for i in range(333)])
    prepare("gsm8k", str(tmp_path / "in"), tmp_path / "out", "verl")
    table = parquet.read_table(tmp_path / "out" / "train.parquet")
    assert [row["index"] for row in table["extra_info"].to_pylist()] == list(range(333))


def test_the_index_is_the_place_in_the_published_split(tmp_path):
    jsonl(tmp_path / "in" / "train-0.jsonl", GOOD, {**GOOD, "answer": "none"}, GOOD)
    jsonl(tmp_path / "in" / "train-1.jsonl", GOOD)
    prepare("gsm8k", str(tmp_path / "in"), tmp_path / "out", "chatlearn")
    indices = [json.loads(line)["extra_info"]["index"] for line in (tmp_path / "out" / "train.json").open()]
    assert indices == [0, 2, 3]


def test_parquet_has_row_groups_of_a_few_megabytes(tmp_path):
    with row_file(tmp_path / "train.parquet", {"image": pyarrow.binary()}) as written:
        for i in range(0, 30, 3):
            written.write([{"image": os.urandom(2**20), "n": i + j} for j in range(3)])
        written.write([])
    table = parquet.ParquetFile(tmp_path / "train.parquet")
    assert [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)] == [6] * 5
    assert table.read()["n"].to_pylist() == list(range(30))


@pytest.mark.parametrize(
    ("later", "message"),
    [({"n": "text"}, "a column changes its type between rows: .*; use one"), ({"n": 1, "m": 2}, "column 'm' is in some rows")],
)
def test_columns_that_do_not_fit_the_first_rows_are_named(tmp_path, later, message):
    with ParquetRows(tmp_path / "t.parquet", {}) as written, pytest.raises(ConfigError, match=rf"t\.parquet: {message}"):
        written.write([{"n": 1}])
        written.write([later])


def test_rows_that_no_file_can_hold_are_named(tmp_path):
    with ParquetRows(tmp_path / "t.parquet", {}) as written, pytest.raises(ConfigError, match="a column changes its type"):
        written.write([{"n": 1}, {"n": "text"}])
    with row_file(tmp_path / "t.jsonl", {}) as written, pytest.raises(ConfigError, match=r"t\.jsonl: a column holds bytes"):
        written.write([{"n": [b"text"]}])


def test_a_column_without_a_value_at_first_may_have_texts_later(tmp_path):
    with ParquetRows(tmp_path / "t.parquet", {}) as written:
        written.write([{"n": None}])
        written.write([{"n": "text"}])
    assert parquet.read_table(tmp_path / "t.parquet")["n"].to_pylist() == [None, "text"]


def test_a_stranger_adds_a_data_set_and_a_layout_by_entry_point(source, tmp_path, monkeypatch):
    mine = Layout(lambda example, origin: {"q": example.question, "from": origin.source}, ".jsonl")
    gsm8k = registry.load("preparations", "gsm8k")
    monkeypatch.setattr(registry, "load", lambda group, name: {"preparations": gsm8k, "layouts": mine}[group])
    prepare("my-set", str(source), tmp_path / "out", "mine")
    assert json.loads((tmp_path / "out" / "test.jsonl").read_text()) == {"q": "1+1?", "from": "openai/gsm8k"}
