"""Resolve a model to its folder: a Hugging Face folder, or one made by an installed source. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlcore import registry
from rlcore.config.sections import ModelConfig, VisionConfig
from rlcore.data.files.records import tried
from rlcore.errors import ConfigError, nearest
from rlcore.model_files import INDEX

if TYPE_CHECKING:
    from rlcore.protocols import ModelFamily

NO_LIMITS = VisionConfig()
Source = Callable[..., None]  # (folder, *, options): fills an empty folder; its keyword-only parameters are model.options


def resolve(config: ModelConfig, cache: Path, section: str = "model", weights: bool = True) -> Path:
    """Resolve `config.path` to a complete model folder, or without `weights` to one that may lack its weight files. A source's
    model is cached in `cache` under a hash of its options.

    ConfigError, naming the run file's `section`, when the path is neither a folder nor a source, the folder is incomplete or
    may not be read, or an option is wrong.
    """
    folder = Path(config.path).expanduser()
    sources = registry.names("models")
    if config.path in sources and not (folder / "config.json").is_file():
        return _made(config, cache, section)
    if not _readable(folder, section):
        known = ", ".join(sources) or "none"
        found = f"{config.path!r} is neither a folder nor an installed model source"
        raise ConfigError(f"{section}.path: {found}; sources: {known}{tried(folder)}")
    if config.options:
        raise ConfigError(f"{section}.options: {config.path} is a folder and takes none; remove {', '.join(config.options)}")
    if weights:
        _check_complete(folder, section)
    return folder


def family_of(folder: Path, config: ModelConfig, vision: VisionConfig = NO_LIMITS) -> ModelFamily:
    """The model family, from `config.family` or the folder's model_type, with the pixel limits of `vision`; ConfigError lists
    the families."""
    families = registry.names("families")
    kind = model_type(folder) if config.family == "auto" else config.family
    if kind not in families:
        if config.family != "auto":
            raise ConfigError(f"model.family: no family named {kind!r}{nearest(kind, families)}")
        raise ConfigError(
            f"model.path: {folder} is of the family {kind!r}; supported: {', '.join(families)};"
            " where one of them has the same layers, name it as model.family"
        )
    family = registry.load("families", kind)
    limits = {key: pixels for key in ("min_pixels", "max_pixels") if (pixels := getattr(vision, key)) is not None}
    if not limits.keys() <= inspect.signature(family).parameters.keys():
        raise ConfigError(f"vision.{min(limits)}: models of the family {kind!r} have no such limit of images; remove it")
    return family(folder, **limits)


def model_type(folder: Path, section: str = "model") -> str:
    """model_type of the folder's config.json."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except FileNotFoundError:
        raise ConfigError(f"{section}.path: {folder} has no config.json; give the folder that holds it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "restore the model's own config.json"
        raise ConfigError(f"{section}.path: {path} names no model_type: {error!r}; {remedy}") from None


def context_length(folder: Path) -> int | None:
    """Maximum positions of the folder's text model, if its config.json gives them."""
    return _text_config(folder).get("max_position_embeddings")


def query_heads(folder: Path) -> int | None:
    """Number of query heads of the folder's text model, if its config.json gives it."""
    return _text_config(folder).get("num_attention_heads")


def _text_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("text_config", config)


def _made(config: ModelConfig, cache: Path, section: str) -> Path:
    source: Source = registry.load("models", config.path)
    options = registry.checked_options(source, config.options, f"{section}.options.", given=1)
    folder = cache / f"{config.path}-{_fingerprint(source, options)}"
    if not folder.is_dir():
        _make(source, options, folder)
    _check_complete(folder, section)
    return folder


def _fingerprint(source: Source, options: Mapping[str, Any]) -> str:
    """Hash of the options and of the source's code, so that an upgrade never serves a model made by an older version."""
    code = Path(inspect.getfile(inspect.unwrap(source))).read_bytes()
    values = json.dumps(options, sort_keys=True, default=str).encode()
    return hashlib.sha256(code + values).hexdigest()[:12]


def _make(source: Source, options: Mapping[str, Any], folder: Path) -> None:
    """Make the model in a temporary folder and rename it: an existing folder is complete, even if others make it too."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(f"{folder.parent}: models cannot be kept there: {error}; make it writable") from None
    try:
        source(unfinished, **options)
        os.replace(unfinished, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _readable(folder: Path, section: str) -> bool:
    """Whether it is a folder; ConfigError names what this user may not read of it."""
    try:
        there = folder.is_dir()
        for file in folder.iterdir() if there else ():
            if file.is_file():
                file.open("rb").close()
    except PermissionError as error:
        remedy = "allow it (chmod -R a+rX, and a+x on the folders above), or give a copy"
        raise ConfigError(f"{section}.path: {error.filename} may not be read by this user; {remedy}") from None
    return there


def _check_complete(folder: Path, section: str) -> None:
    model_type(folder, section)
    index = folder / INDEX
    if index.is_file():
        needed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in needed if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"{section}.path: {folder} lacks {len(missing)} of {len(needed)} weight files ({missing[0]} first);"
                " finish copying it"
            )
    elif not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{section}.path: {folder} has a config.json but no *.safetensors; copy the weights there in that format"
        )
