"""Which split a data file belongs to, told by its name, and where in a folder of a published data set its files lie."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from rlcore.errors import ConfigError

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_ABOUT_DATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")  # written by `datasets`
_PLACES = ("data", "main", "default")  # folders in a folder whose files are preferred to those of other subfolders
_SHARD = re.compile(r"(\d+)-of-(\d+)")
_LISTED = 8  # files named in an error


def split_of(name: str) -> str | None:
    """`train`, `test` or `validation`, from the words of a file's or folder's name; None where it holds none or two of them.

    Words are letters between other characters: `geo3k-train.jsonl` and `eval_00000.parquet`, but not `pretraining.jsonl`.
    """
    words = re.findall(r"[a-z]+", Path(name).stem.lower() if Path(name).suffix in SUFFIXES else name.lower())
    found = {_SPLITS[word] for word in words if word in _SPLITS}
    return found.pop() if len(found) == 1 else None


def files_of_split(folder: Path, split: str | None = None) -> list[Path]:
    """The files of one split in order, or all data files of the folder where no name tells a split.

    ConfigError when the split is not there, and for split=None when there are several.
    """
    found = splits(folder)
    there = " and ".join(found)
    if split is not None:
        if split not in found:
            files = _listed(folder, data_files(folder))
            holds = f"there is {there}" if found else f"no file's name tells one: {files}"
            raise ConfigError(f"{folder}: no file of the split {split!r}; {holds}")
        return found[split]
    if len(found) > 1:
        raise ConfigError(
            f"{folder}: holds the splits {there}; say which with the option split (split: {next(iter(found))}), or give the"
            " path of a file of one"
        )
    return next(iter(found.values()), data_files(folder))


def splits(folder: Path) -> dict[str, list[Path]]:
    """Files by split, in the order train, test, validation, then by name; {} where no name tells one.

    A folder of `datasets.save_to_disk`, or the first of these that has files of a split: the folder itself, `data`, `main`,
    `default`, its only other subfolder that has some. Files in a folder called after a split belong to it. ConfigError when
    several subfolders have some, when a split has files of two names (train.jsonl, train_extra.jsonl), and when beside files
    of a split lies one of the same kind that tells none.
    """
    if saved := _saved(folder):
        return saved
    for place in (folder, *(folder / name for name in _PLACES)):
        if found := _told(place):
            return found
    others = [place for place in _folders(folder) if place.name not in _PLACES and _told(place)]
    if len(others) > 1:
        raise ConfigError(f"{folder}: {', '.join(place.name for place in others)} each hold a data set; give the path of one")
    return _told(others[0]) if others else {}


def data_files(folder: Path) -> list[Path]:
    """The data files directly in a folder, shards in order; hidden ones and those about the data set are left out."""
    if not folder.is_dir():
        return []
    files = (file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())
    return sorted((file for file in files if not file.name.startswith(".") and file.name not in _ABOUT_DATA), key=_order)


def missing_shards(files: Iterable[Path]) -> str:
    """`2 of 262 files are there`, from names like train-00000-of-00262.parquet; empty where none is missing."""
    shards = [tuple(map(int, found.groups())) for file in files if (found := _SHARD.search(file.stem))]
    count = max((total for _, total in shards), default=0)
    return f"{len(shards)} of {count} files are there" if len(shards) < count else ""


def _told(folder: Path) -> dict[str, list[Path]]:
    """Files by split of one folder and of its subfolders that are called after a split."""
    files = [(split_of(file.name), file) for file in data_files(folder)]
    for place in _folders(folder):
        if inside := split_of(place.name):
            files += [(split_of(file.name) or inside, file) for file in data_files(place)]
    told = [(split, file) for split, file in files if split]
    kinds = {file.suffix for _, file in told}
    if strange := [file for split, file in files if not split and file.suffix in kinds]:
        raise ConfigError(
            f"{folder}: no split is told by the name of {_listed(folder, strange)}, beside"
            f" {_listed(folder, (file for _, file in told))}; put train, test or validation in each name, or move away what is"
            " not of the data set"
        )
    rank = {split: place for place, split in enumerate(dict.fromkeys(_SPLITS.values()))}
    told.sort(key=lambda one: rank[one[0]])
    found = {split: [file for _, file in group] for split, group in groupby(told, key=lambda one: one[0])}
    for split, shards in found.items():
        _check_one_name(folder, split, shards)
    return found


def _check_one_name(folder: Path, split: str, files: list[Path]) -> None:
    """ConfigError when the files are not the shards of one: their names differ in more than numbers."""
    names = {}
    for file in files:
        stem = re.sub(r"-[0-9a-f]{16}$", "", file.stem)  # the hub once added a hash to each shard
        names.setdefault((file.parent, re.sub(r"\d+", "#", stem), file.suffix), file)
    if len(names) > 1:
        raise ConfigError(
            f"{folder}: {_listed(folder, names.values())} are all called {split}, and are not the shards of one file; keep one"
            " in this folder, or give its path"
        )


def _saved(folder: Path) -> dict[str, list[Path]]:
    """Files by split of a folder that `datasets` saved; {} for any other."""
    if (folder / "dataset_dict.json").is_file():
        named = _object(folder / "dataset_dict.json").get("splits", [])
        return {split_of(name) or name: _saved_files(folder / name) for name in named}
    if (folder / "state.json").is_file() and "_data_files" in (state := _object(folder / "state.json")):
        split = split_of(str(state.get("_split"))) or split_of(folder.name)
        return {split: _saved_files(folder)} if split else {}
    return {}


def _saved_files(folder: Path) -> list[Path]:
    state = _object(folder / "state.json")
    if state.get("_indices_data_files"):
        raise ConfigError(f"{folder}: rows were selected without being written; call flatten_indices() and save_to_disk again")
    files = [folder / entry["filename"] for entry in state.get("_data_files", [])]
    if gone := [file for file in files if not file.is_file()]:
        raise ConfigError(f"{folder}: state.json names {_listed(folder, gone)}, which is not there; copy the whole folder")
    return files


def _object(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}; save_to_disk writes it") from None
    return found if isinstance(found, dict) else {}


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))


def _order(file: Path) -> list[int | str]:
    """Sort key with numbers by value: part-2 before part-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]


def _listed(folder: Path, files: Iterable[Path]) -> str:
    names = [str(file.relative_to(folder)) for file in files]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) + more) or "no data file at all"
