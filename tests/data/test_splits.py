"""Train and test files are told apart by their names, in every form a data set is published in, or not at all."""

from __future__ import annotations

import json

import pyarrow
import pytest
from pyarrow import parquet

from rlcore.data.files.published import files_by_split, split_records
from rlcore.data.files.splits import data_files, files_of_split, missing_shards, split_of, splits
from rlcore.errors import ConfigError


def put(folder, *names):
    """Data files of one row, whose text is their name."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            parquet.write_table(pyarrow.table({"text": [name]}), file)
        elif file.suffix == ".arrow":
            with pyarrow.ipc.new_stream(file, pyarrow.schema({"text": pyarrow.string()})) as stream:
                stream.write_table(pyarrow.table({"text": [name]}))
        else:
            file.write_text(json.dumps({"text": name}) + "\n")
    return folder


def saved(folder, *names, splits=("train", "test")):
    """A folder as `datasets.save_to_disk` writes it."""
    put(folder, *names)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    for split in splits:
        files = [{"filename": file.name} for file in sorted((folder / split).glob("*.arrow"))]
        (folder / split / "state.json").write_text(json.dumps({"_data_files": files, "_split": split}))
        (folder / split / "dataset_info.json").write_text("{}")
    return folder


def names(found):
    return {split: [file.name for file in files] for split, files in found.items()}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"), ("test.jsonl", "test"), ("validation-00000-of-00001.parquet", "validation"),
        ("geo3k_train.json", "train"), ("Train.jsonl", "train"), ("eval_0.jsonl", "test"), ("dev.jsonl", "validation"),
        ("my.val.jsonl", "validation"), ("train", "train"), ("data-00000-of-00001.arrow", None), ("pretraining.jsonl", None),
        ("train_test.jsonl", None), ("latest.jsonl", None), ("rows.jsonl", None), ("training-train.jsonl", "train"),
    ],
)  # fmt: skip
def test_a_name_tells_its_split_by_whole_words(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("place", ["", "data/", "main/", "default/", "other/"])
def test_shards_are_found_wherever_they_are_published(tmp_path, place):
    shards = [f"{place}{split}-{i:05}-of-00011.parquet" for split in ("test", "train") for i in range(11)]
    put(tmp_path, *shards)
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "dataset_infos.json").write_text("{}")
    found = splits(tmp_path)
    assert list(found) == ["train", "test"]
    assert names(found)["train"] == [f"train-{i:05}-of-00011.parquet" for i in range(11)]
    assert [record.values["text"] for record in split_records(tmp_path, "test")] == shards[:11]


def test_numbers_without_zeros_are_in_order(tmp_path):
    put(tmp_path, "train_10.jsonl", "train_9.jsonl", "train_1.jsonl")
    assert names(splits(tmp_path)) == {"train": ["train_1.jsonl", "train_9.jsonl", "train_10.jsonl"]}


def test_folders_called_after_a_split_hold_its_files(tmp_path):
    put(tmp_path, "train/part-0.parquet", "train/part-1.parquet", "test/part-0.parquet")
    assert names(splits(tmp_path)) == {"train": ["part-0.parquet", "part-1.parquet"], "test": ["part-0.parquet"]}


def test_a_saved_data_set_is_read_in_the_order_it_says(tmp_path):
    saved(tmp_path, "train/data-00000-of-00002.arrow", "train/data-00001-of-00002.arrow", "test/data-00000-of-00001.arrow")
    assert {split: len(files) for split, files in files_by_split(tmp_path).items()} == {"train": 2, "test": 1}
    read = [(record.where, record.values["text"]) for record in split_records(tmp_path, "train")]
    assert read == [(f"data-{i:05}-of-00002.arrow row 1", f"train/data-{i:05}-of-00002.arrow") for i in range(2)]
    assert names(splits(tmp_path / "train")) == {"train": ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]}


def test_a_saved_data_set_with_a_file_missing_or_rows_unwritten_is_named(tmp_path):
    saved(tmp_path, "train/data-00000-of-00001.arrow", splits=("train",))
    (tmp_path / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ConfigError, match=r"state\.json names data-00000-of-00001\.arrow, which is not there"):
        splits(tmp_path)
    (tmp_path / "train" / "state.json").write_text(json.dumps({"_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(ConfigError, match=r"rows were selected without being written; call flatten_indices"):
        splits(tmp_path)


def test_a_broken_arrow_file_is_named(tmp_path):
    put(tmp_path, "train.arrow")
    whole = (tmp_path / "train.arrow").read_bytes()
    (tmp_path / "train.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"train\.arrow: not a readable arrow file: "):
        list(split_records(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train.jsonl", "test.jsonl", "more.jsonl"], r"by the name of more\.jsonl, beside test\.jsonl, train\.jsonl; "),
        (["train.jsonl", "train_socratic.jsonl"], r"train\.jsonl, train_socratic\.jsonl are all called train, and"),
        (["train.jsonl", "train.parquet"], r"train\.jsonl, train\.parquet are all called train"),
        (["train.jsonl", "train/train.jsonl"], r"train\.jsonl, train/train\.jsonl are all called train"),
        (["algebra/train.jsonl", "geometry/train.jsonl"], r"algebra, geometry each hold a data set; give the path of one"),
    ],
)
def test_files_that_cannot_be_told_apart_are_listed(tmp_path, files, message):
    put(tmp_path, *files)
    with pytest.raises(ConfigError, match=message):
        files_by_split(tmp_path)


@pytest.mark.parametrize("files", [[], ["a.jsonl", "b.jsonl"], ["notes/a.jsonl"]])
def test_a_folder_where_no_name_tells_a_split_lists_what_it_holds(tmp_path, files):
    put(tmp_path, *files)
    direct = ", ".join(name for name in files if "/" not in name) or "no data file"
    with pytest.raises(ConfigError, match=rf"no name tells a split \({direct}\); call the files train\.\.\., test"):
        files_by_split(tmp_path)
    assert splits(tmp_path) == {}


def test_a_single_file_is_of_the_split_that_its_name_tells(tmp_path):
    put(tmp_path, "test-0.jsonl", "rows.jsonl")
    assert names(files_by_split(tmp_path / "test-0.jsonl")) == {"test": ["test-0.jsonl"]}
    for name in ("rows.jsonl", "train.csv"):
        (tmp_path / "train.csv").write_text("text")
        with pytest.raises(ConfigError, match=rf"no name tells a split \({name}\)"):
            files_by_split(tmp_path / name)
    with pytest.raises(ConfigError, match=r"gone: no such data file or folder"):
        files_by_split(tmp_path / "gone")


def test_files_about_the_data_other_kinds_and_hidden_ones_are_no_rows(tmp_path):
    put(tmp_path, "train.parquet", "settings.json", "dataset_info.json", ".train.parquet", ".cache/test.parquet")
    assert names(splits(tmp_path)) == {"train": ["train.parquet"]}
    assert [file.name for file in data_files(tmp_path)] == ["settings.json", "train.parquet"]


def test_hashes_that_the_hub_put_in_names_do_not_make_two_files(tmp_path):
    put(tmp_path, "train-00000-of-00002-a81bf3c7de015fe2.parquet", "train-00001-of-00002-0c5e7712bb9dfa34.parquet")
    assert len(splits(tmp_path)["train"]) == 2


def test_both_splits_in_a_folder_are_never_read_together(tmp_path):
    put(tmp_path, "train.jsonl", "test.jsonl")
    with pytest.raises(ConfigError, match=r"holds the splits train and test; say which with the option split \(split: train\)"):
        list(split_records(tmp_path))
    assert [record.values["text"] for record in split_records(tmp_path, "test")] == ["test.jsonl"]
    with pytest.raises(ConfigError, match=r"no file of the split 'validation'; there is train and test"):
        list(split_records(tmp_path, "validation"))
    with pytest.raises(ConfigError, match=r"its name tells the split 'train', and the option split says 'test'"):
        list(split_records(tmp_path / "train.jsonl", "test"))


def test_a_folder_of_one_split_or_of_none_told_is_read_whole(tmp_path):
    put(tmp_path / "one", "train-0.jsonl", "train-1.jsonl")
    put(tmp_path / "none", "a.jsonl", "b.jsonl")
    assert len(list(split_records(tmp_path / "one"))) == len(list(split_records(tmp_path / "none"))) == 2
    assert [file.name for file in files_of_split(tmp_path / "none")] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(ConfigError, match=r"no file of the split 'train'; no file's name tells one: a\.jsonl, b\.jsonl"):
        list(split_records(tmp_path / "none", "train"))


def test_shards_that_were_not_fetched_are_counted(tmp_path):
    put(tmp_path, "train-00000-of-00262.parquet", "train-00007-of-00262.parquet")
    assert missing_shards(splits(tmp_path)["train"]) == "2 of 262 files are there"
    assert missing_shards([tmp_path / "train.parquet"]) == missing_shards([]) == ""
