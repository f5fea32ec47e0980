"""Data sets by their id on a hub: fetched once, then read from the hub client's cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from rlcore.errors import ConfigError, PluginError

PATTERNS = ("*.parquet", "*.jsonl", "*.json", "*.arrow")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MODELSCOPE = "modelscope:"
_FOLDER = "give a folder that holds its files (--input FOLDER, path: FOLDER)"


def local(path: str | Path) -> Path:
    """The folder of a data set: the path itself where it exists, else the files of the id `org/name` or `modelscope:org/name`.

    An id without prefix is looked up at HF_ENDPOINT, by default https://huggingface.co. Any other path comes back as it is, for
    the caller to miss. ConfigError when the files cannot be had, PluginError without the modelscope package.
    """
    place, name = Path(path).expanduser(), str(path)
    if place.exists():
        return place
    if name.startswith(_MODELSCOPE):
        return _fetched(_from_modelscope, name.removeprefix(_MODELSCOPE), name)
    if _ID.fullmatch(name) and not name.endswith(tuple(pattern[1:] for pattern in PATTERNS)):
        return _fetched(_from_hugging_face, name, name)
    return place


def _fetched(fetch: Callable[[str], str], repo: str, name: str) -> Path:
    if not _ID.fullmatch(repo):
        raise ConfigError(f"{name}: {repo!r} is not an id; an id is org/name")
    folder = Path(fetch(repo))
    if not any(file.is_file() for pattern in PATTERNS for file in folder.rglob(pattern)):
        raise ConfigError(f"{name}: holds no {', '.join(pattern[1:] for pattern in PATTERNS)} file; convert it, then {_FOLDER}")
    return folder


def _from_hugging_face(repo: str) -> str:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    here = f"{repo}: no such data file or folder here ({Path(repo).absolute()}), and"
    try:
        return snapshot_download(repo, repo_type="dataset", allow_patterns=list(PATTERNS))
    except GatedRepoError:
        remedy = f"accept them on its page and set HF_TOKEN, or {_FOLDER}"
        raise ConfigError(f"{here} {constants.ENDPOINT} asks to accept conditions for that data set; {remedy}") from None
    except RepositoryNotFoundError:
        remedy = "check the name; a private one needs HF_TOKEN"
        raise ConfigError(f"{here} {constants.ENDPOINT} has no data set of that id; {remedy}") from None
    except Exception as error:  # the client's own, its HTTP library's and the disk's; they differ between its versions
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{type(error).__name__}: {_short(error)}"
        remedy = f"set HF_ENDPOINT to a mirror within reach, or {_FOLDER}"
        raise ConfigError(f"{here} it cannot be fetched from {constants.ENDPOINT} ({reason}); {remedy}") from error


def _from_modelscope(repo: str) -> str:
    try:
        from modelscope.hub.snapshot_download import dataset_snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PluginError(
            f"{_MODELSCOPE}{repo}: modelscope cannot be imported ({error}); pip install modelscope, or {_FOLDER}"
        ) from None
    try:
        return dataset_snapshot_download(repo, allow_file_pattern=list(PATTERNS))
    except Exception as error:  # as above
        reason, remedy = f"{type(error).__name__}: {_short(error)}", f"check the name and the network, or {_FOLDER}"
        raise ConfigError(f"{_MODELSCOPE}{repo}: cannot be fetched ({reason}); {remedy}") from error


def _short(error: Exception) -> str:
    """An error's root cause, on one line."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return " ".join(str(error).split())[:200]
