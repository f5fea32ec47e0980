"""Records of a published data set, one split of it or all, whatever form it was published in."""

from __future__ import annotations

from pathlib import Path

from rlcore.data.files.hub import local
from rlcore.data.files.records import Records, open_records, opened, tried
from rlcore.data.files.splits import SUFFIXES, data_files, files_of_split, split_of, splits
from rlcore.errors import ConfigError


def split_records(path: str | Path | None, split: str | None = None) -> Records:
    """Records of a file, or of one split of a folder or hub id; ConfigError when a folder holds several and none is chosen.

    A folder where no name tells a split is read whole, as by `open_records`.
    """
    place = None if path is None else local(path)
    if place is not None and place.is_dir() and (split is not None or splits(place)):
        return opened(files_of_split(place, split))
    if place is not None and split is not None and split_of(place.name) not in (None, split):
        raise ConfigError(f"{place}: its name tells the split {split_of(place.name)!r}, and the option split says {split!r}")
    return open_records(place)


def files_by_split(path: Path) -> dict[str, list[Path]]:
    """The files of every split of a folder, or of the one a file's name tells. ConfigError, listing the files, when no name
    tells one."""
    if not path.exists():
        raise ConfigError(f"{path}: no such data file or folder{tried(path)}")
    if path.is_dir():
        files, found = data_files(path), splits(path)
    else:
        split = split_of(path.name)
        files, found = [path], {split: [path]} if split and path.suffix in SUFFIXES else {}
    if not found:
        holds = ", ".join(file.name for file in files[:8]) + (" and more" if len(files) > 8 else "") or "no data file"
        raise ConfigError(
            f"{path}: no name tells a split ({holds}); call the files train..., test... or validation..., with the suffix"
            f" {', '.join(SUFFIXES)}"
        )
    return found
