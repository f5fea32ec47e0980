"""Data files are read where they are accessed, and nothing else of them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading

import pyarrow
import pytest
from pyarrow import parquet

from rlcore.data.files import tables
from rlcore.data.files.published import split_records
from rlcore.data.files.records import open_records
from rlcore.errors import ConfigError


def table(count, **columns):
    return pyarrow.table({"prompt": [f"q{number}" for number in range(count)], **columns})


def write_arrow(rows, path, kind):
    opened = {"stream": pyarrow.ipc.new_stream, "file": pyarrow.ipc.new_file}[kind]
    with opened(str(path), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=7)


KINDS = {"lines": ".jsonl", "list": ".json", "parquet": ".parquet", "stream": ".arrow", "file": ".arrow"}


def write(rows, path, kind):
    """`rows` as a file of one of KINDS; returns its path."""
    path = path.with_suffix(KINDS[kind])
    if kind == "lines":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.to_pylist()))
    elif kind == "list":
        path.write_text(json.dumps(rows.to_pylist()))
    elif kind == "parquet":
        parquet.write_table(rows, path, row_group_size=6)
    else:
        write_arrow(rows, path, kind)
    return path


@pytest.fixture(params=KINDS)
def stored(request, tmp_path):
    """A file of 20 rows, of each kind."""
    return write(table(20, answer=[str(number) for number in range(20)]), tmp_path / "rows", request.param)


def test_any_row_of_any_file_can_be_accessed_in_any_order(stored):
    records = open_records(stored)
    order = random.Random(1).sample(range(20), 20)
    assert [records[place].values for place in order] == [{"prompt": f"q{n}", "answer": f"{n}"} for n in order]
    assert records[-1].id == "rows:20" and [record.id for record in records[3:5]] == ["rows:4", "rows:5"]


def test_files_of_a_folder_follow_one_another(stored):
    (stored.parent / f"more{stored.suffix}").write_bytes(stored.read_bytes())
    records = open_records(stored.parent)
    assert len(records) == 40 and [records[place].id for place in (19, 20, 39)] == ["more:20", "rows:1", "rows:20"]


def test_threads_may_read_at_a_time(stored):
    records, wrong = open_records(stored), []

    def read(seed):
        for place in random.Random(seed).choices(range(20), k=200):
            if records[place].values["answer"] != str(place):
                wrong.append(place)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_without_rows_is_passed_over(tmp_path, kind):
    """Who writes more shards than there are rows leaves some empty."""
    first, empty, last = (
        write(table(5).slice(start, count), tmp_path / f"train-{number}-of-00003", kind)
        for number, (start, count) in enumerate([(0, 3), (3, 0), (3, 2)])
    )
    assert [record.values["prompt"] for record in split_records(tmp_path, "train")] == ["q0", "q1", "q2", "q3", "q4"]
    first.unlink(), last.unlink()
    with pytest.raises(ConfigError, match=f"{empty.name}: holds no rows"):
        split_records(tmp_path, "train")


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    write_arrow(table(5), tmp_path / "data-00000-of-00001.arrow", "stream")
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert [record.values["prompt"] for record in open_records(tmp_path)] == [f"q{n}" for n in range(5)]


def test_lines_are_found_whatever_their_length_and_their_blanks(tmp_path, monkeypatch):
    monkeypatch.setattr("rlcore.data.files.lines._BLOCK", 64)
    rows = [{"a": "x" * length} for length in (0, 5, 60, 64, 65, 200, 1)]
    text = "\n\n".join(json.dumps(row) for row in rows) + "\n  \r\n"
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    records = open_records(tmp_path / "rows.jsonl")
    assert [record.values for record in records] == rows
    assert [record.where for record in records] == [f"rows.jsonl:{1 + 2 * place}" for place in range(len(rows))]


def test_a_broken_row_is_an_error_where_it_is_accessed(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    records = open_records(tmp_path / "rows.jsonl")
    assert len(records) == 3 and records[2].values == {"a": 3}
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: not valid JSON"):
        records[1]


def test_a_reader_keeps_the_last_row_groups_up_to_its_limit(tmp_path, monkeypatch):
    parquet.write_table(table(100, blob=[bytes([n]) * 1000 for n in range(100)]), tmp_path / "x.parquet", row_group_size=10)
    read, real = [], parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile, "read_row_group", lambda self, number: read.append(number) or real(self, number)
    )
    monkeypatch.setattr(tables, "_HELD_BYTES", 25_000)
    records = open_records(tmp_path / "x.parquet")
    assert read == []
    for place in (5, 7, 15, 3, 25, 19, 4):
        assert records[place].values["blob"] == bytes([place]) * 1000
    assert read == [0, 1, 2, 1, 0]


def test_a_row_group_too_large_to_be_read_for_one_row_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_LARGEST_GROUP", 1000)
    parquet.write_table(table(100, blob=[bytes(100)] * 100), tmp_path / "x.parquet", use_dictionary=False)
    with pytest.raises(ConfigError, match=r"x\.parquet: a row group has 0\.0 GiB, and .* row_group_size=100"):
        open_records(tmp_path / "x.parquet")


def test_nested_columns_have_dotted_names(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a.b": 1, "a": {"b": 2, "c": {"d.e": 3}}}\n')
    (record,) = open_records(tmp_path / "rows.jsonl")
    assert (record.value("a.b"), record.value("a.c.d.e")) == (1, 3)
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: no field 'bb' in the column 'a', which has b, c"):
        record.value("a.bb")
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: no column 'x\.y' among a\.b, a"):
        record.value("x.y")


def measured(script, *paths):
    """Seconds of processor time and KiB of peak memory that the script takes, in a process of its own."""
    script = (
        "import re, sys, time; from rlcore.data.files.records import open_records; import pyarrow.parquet\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before, start = peak(), time.process_time()\n"
        f"{script}\n"
        "print(time.process_time() - start, peak() - before)"
    )
    return map(float, subprocess.check_output([sys.executable, "-c", script, *map(str, paths)]).split())


def test_a_million_rows_are_opened_in_seconds_and_little_memory(tmp_path):
    parquet.write_table(table(1_000_000), tmp_path / "many.parquet", row_group_size=1000)
    with (tmp_path / "many.jsonl").open("w") as file:
        file.writelines(f'{{"prompt": "q{number}"}}\n' for number in range(1_000_000))
    script = (
        "for path in sys.argv[1:]:\n"
        "    records = open_records(path)\n"
        "    assert [records[n].values['prompt'] for n in (0, 999_999, 123_456)] == ['q0', 'q999999', 'q123456']"
    )
    seconds, kib = measured(script, tmp_path / "many.parquet", tmp_path / "many.jsonl")
    assert seconds < 5 and kib < 150 * 1024


def test_memory_of_a_reader_does_not_grow_with_what_it_has_read(tmp_path):
    """Pages of a mapped file would count as the process's own."""
    rows = pyarrow.table({"image": [bytes([number]) * 2**20 for number in range(200)]})
    parquet.write_table(rows, tmp_path / "images.parquet", row_group_size=4, compression="none", use_dictionary=False)
    script = "records = open_records(sys.argv[1])\nfor n in range(200): assert records[n].values['image'][0] == n"
    _, kib = measured(script, tmp_path / "images.parquet")
    assert kib < 150 * 1024, "64 MiB of row groups are kept, of 200"
