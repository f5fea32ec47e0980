"""Another framework's YAML file under its command-line overrides, as a flat table of dotted keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlcore.config.foreign.interpolation import resolved
from rlcore.config.loader import EachKeyOnce, read_mapping
from rlcore.errors import ConfigError

_UNSET = "???"  # OmegaConf's mark of a value that must be given
_OVERRIDE = re.compile(r"(\+\+|\+|~|)([\w.*-]+)(?:=(.*))?", re.DOTALL)
_CHOICE = re.compile(r"[+~]*[\w./-]*[/@][\w./@-]*=.*", re.DOTALL)  # of a file to compose: model@actor.model=qwen, data/vlm=x


class _OmegaConfYaml(EachKeyOnce):
    """Reads 1e-6 as a number, as OmegaConf does; YAML 1.1 wants 1.0e-6 and would give a text."""


_OmegaConfYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class Document:
    """What a user of the other framework would run: file and overrides, interpolations resolved."""

    source: str  # its path, for messages
    values: Mapping[str, Any]  # by dotted key; lists are values; None where it is empty or must still be given


def read_document(
    path: Path, overrides: Sequence[str], is_known: Callable[[str], bool], defaults: Mapping[str, Any],
    environment: Mapping[str, str],
) -> Document:  # fmt: skip
    """Read a file and apply overrides as Hydra and OmegaConf have them. `is_known`: whether the framework has a key, which the
    file need not hold; `defaults`: values of such keys. ConfigError names the file and the key."""
    tree = read_mapping(path, _OmegaConfYaml)
    for override in overrides:
        _apply(tree, override, str(path), is_known)
    return Document(str(path), dict(_flat(resolved(tree, defaults, environment))))


def _apply(tree: dict[str, Any], override: str, source: str, is_known: Callable[[str], bool]) -> None:
    """`a.b=value` replaces a key, `+` adds a new one, `++` does either, `~` removes one."""
    if _CHOICE.fullmatch(override):
        raise ConfigError(f"{override!r} chooses a file to compose, which is not read; give the composed file (--cfg job)")
    match = _OVERRIDE.fullmatch(override)
    if match is None or (match[1] != "~" and match[3] is None):
        raise ConfigError(f"{override!r}: an override is a.b=value, +a.b=value, ++a.b=value or ~a.b")
    sign, key, text = match.groups()
    there = _find(tree, key)
    if sign == "+" and there:
        raise ConfigError(f"{override!r}: {key} is already in {source}; write {key}={text} to replace it")
    if sign in ("", "~") and not there and (sign == "~" or not is_known(key)):
        remedy = "" if sign == "~" else f"; write +{key}={text} to add it"
        raise ConfigError(f"{override!r}: {source} has no {key}{remedy}")
    if sign == "~":
        _remove(tree, key)
    else:
        _put(tree, key, _parsed(override, text))


def _parsed(override: str, text: str) -> Any:
    try:
        return yaml.load(text, _OmegaConfYaml)
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: the value is not valid YAML") from None


def _find(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for name in sections:
        below = tree.get(name)
        if below is None:
            below = tree[name] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"{key}: {name!r} is a plain value ({below!r}), not a section")
        tree = below
    tree[last] = value


def _remove(tree: dict[str, Any], key: str) -> None:
    *sections, last = key.split(".")
    for name in sections:
        tree = tree[name]
    del tree[last]


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is not a section; an empty section is None."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{key}.")
        else:
            yield key, None if value in (_UNSET, {}) else value
