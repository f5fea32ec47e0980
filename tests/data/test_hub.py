"""An id is fetched from the hub that HF_ENDPOINT names, by the real client; whatever fails says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow
import pytest
from hub_server import hub
from pyarrow import parquet

from rlcore.data.files.hub import local
from rlcore.data.files.published import files_by_split, split_records
from rlcore.errors import ConfigError

PROGRAM = """
import sys
from rlcore.data.files.hub import local
from rlcore.errors import ConfigError
for path in sys.argv[1:]:
    try:
        print(local(path))
    except ConfigError as error:
        print(f"{type(error).__name__}: {error}")
"""


def resolved(folder, *paths, **environment):
    """What `local` makes of the paths in a process of its own, whose working directory and caches are in the folder."""
    names = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    settings = {**inherited, "HF_HOME": str(folder / "cache"), "NO_PROXY": "127.0.0.1,localhost", **environment}
    command = [sys.executable, "-c", PROGRAM, *paths]
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folders of three data sets as the hub has them."""
    root = tmp_path_factory.mktemp("published")
    for split, rows in (("train", 3), ("test", 1)):
        for place in ("main", "socratic"):
            (root / "gsm8k" / place).mkdir(parents=True, exist_ok=True)
            table = pyarrow.table({"question": [f"{place} {split} {i}" for i in range(rows)], "answer": ["#### 1"] * rows})
            parquet.write_table(table, root / "gsm8k" / place / f"{split}-00000-of-00001.parquet")
        (root / "lines").mkdir(exist_ok=True)
        (root / "lines" / f"{split}.jsonl").write_text(json.dumps({"question": split, "answer": "#### 2"}) + "\n")
    (root / "gsm8k" / "README.md").write_text("about the data")
    (root / "gsm8k" / "loader.py").write_text("raise SystemExit")
    (root / "code").mkdir()
    (root / "code" / "loader.py").write_text("raise SystemExit")
    return root


def test_the_files_of_an_id_come_from_the_endpoint_once(tmp_path, published):
    with hub({"openai/gsm8k": published / "gsm8k", "some/lines": published / "lines"}) as (endpoint, asked):
        gsm8k, lines = resolved(tmp_path, "openai/gsm8k", "some/lines", HF_ENDPOINT=endpoint)
        fetched = [request for request in asked if request.startswith(("GET /storage/", "GET /datasets/"))]
    names = sorted(request.rpartition("/")[2] for request in fetched)
    test, train = "test-00000-of-00001.parquet", "train-00000-of-00001.parquet"
    assert names == [test, test, "test.jsonl", train, train, "train.jsonl"]
    assert [record.values["question"] for record in split_records(gsm8k, "train")] == [f"main train {i}" for i in range(3)]
    assert {split: len(files) for split, files in files_by_split(local(lines)).items()} == {"train": 1, "test": 1}
    unreachable = resolved(tmp_path, "openai/gsm8k", "some/lines", HF_ENDPOINT=endpoint)  # its server has ended
    assert unreachable == resolved(tmp_path, "openai/gsm8k", "some/lines", HF_HUB_OFFLINE="1") == [gsm8k, lines]


def test_an_id_that_cannot_be_had_says_what_to_do(tmp_path, published):
    with hub({"gated/set": published / "lines", "only/code": published / "code"}, gated="gated/set") as (endpoint, _):
        gone, gated, code = resolved(tmp_path, "no/such", "gated/set", "only/code", HF_ENDPOINT=endpoint)
    assert f"no/such: no such data file or folder here ({tmp_path}/no/such), and {endpoint} has no data set of that id" in gone
    assert f"{endpoint} asks to accept conditions for that data set; accept them on its page and set HF_TOKEN" in gated
    assert "only/code: holds no .parquet, .jsonl, .json, .arrow file; convert it, then give a folder" in code


def test_without_a_network_the_mirror_and_the_folder_are_the_remedies(tmp_path):
    (refused,) = resolved(tmp_path, "openai/gsm8k", HF_ENDPOINT="http://127.0.0.1:9")
    (offline,) = resolved(tmp_path, "openai/gsm8k", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    for line, reason in ((refused, "Connection refused"), (offline, "(HF_HUB_OFFLINE is set)")):
        assert line.startswith("ConfigError: openai/gsm8k: no such data file or folder here") and reason in line
        assert "; set HF_ENDPOINT to a mirror within reach, or give a folder that holds its files (--input FOLDER, " in line


def test_an_existing_path_is_never_an_id_and_other_paths_come_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    assert str(local("openai/gsm8k")) == "openai/gsm8k"
    names = "data/rows.jsonl data/set.parquet ./openai/set ../openai/set /openai/set set a/b/c a/-b .a/b"
    for path in names.split():
        assert str(local(path)) == path.removeprefix("./")


def test_a_modelscope_id_needs_its_package(tmp_path):
    (missing, wrong) = resolved(tmp_path, "modelscope:org/set", "modelscope:set")
    assert missing.startswith("PluginError: modelscope:org/set: modelscope cannot be imported (No module named 'modelscope'")
    assert "; pip install modelscope, or give a folder" in missing
    assert wrong == "ConfigError: modelscope:set: 'set' is not an id; an id is org/name"


def test_a_modelscope_id_is_fetched_by_its_package(tmp_path, published):
    """Its package is not installed here: a stand-in with its function's signature."""
    module = tmp_path / "stand-in" / "modelscope" / "hub"
    module.mkdir(parents=True)
    (module / "snapshot_download.py").write_text(
        "def dataset_snapshot_download(dataset_id, revision=None, cache_dir=None, local_dir=None, allow_file_pattern=None):\n"
        "    if dataset_id != 'org/lines':\n"
        "        raise ConnectionError('no route')\n"
        f"    return {str(published / 'lines')!r}\n"
    )
    found, failed = resolved(tmp_path, "modelscope:org/lines", "modelscope:org/other", PYTHONPATH=str(tmp_path / "stand-in"))
    assert found == str(published / "lines")
    assert "modelscope:org/other: cannot be fetched (ConnectionError: no route); check the name and the network, or" in failed


def test_a_read_of_an_id_that_is_not_there_keeps_both_reasons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"gone\.jsonl: no such data file or folder"):
        list(split_records("data/gone.jsonl"))
