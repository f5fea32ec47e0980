"""OmegaConf's interpolations: `${a.b}`, `${.b}`, `${oc.env:NAME,default}`, `${oc.select:a.b,default}`, `${oc.decode:text}`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

_INNERMOST = re.compile(r"\$\{([^${}]*)\}")


@dataclass(frozen=True)
class Unresolved:
    """A value that another program would compute. Only asking for it is an error: many keys are not needed here."""

    text: str  # as written
    why: str

    def __str__(self) -> str:
        return self.text


class _CannotResolve(Exception):
    """Why a reference has no value here."""


def resolved(tree: Mapping[str, Any], defaults: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """A copy of the tree in which each interpolation is its value, or Unresolved. `defaults`: of keys that the tree lacks."""
    return _Resolver(tree, defaults, environment).section((), tree)


class _Resolver:
    def __init__(self, tree: Mapping[str, Any], defaults: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self._tree, self._defaults, self._environment = tree, defaults, environment
        self._open: list[tuple[str, ...]] = []  # keys that are being resolved, to find circles

    def section(self, path: tuple[str, ...], values: Mapping[str, Any]) -> dict[str, Any]:
        return {str(name): self._value((*path, str(name)), value) for name, value in values.items()}

    def _value(self, path: tuple[str, ...], value: Any) -> Any:
        if isinstance(value, Mapping):
            return self.section(path, value)
        if isinstance(value, list):
            entries = [self._value(path, entry) for entry in value]
            return next(_unresolved(entries), entries)
        if not isinstance(value, str) or "${" not in value:
            return value
        try:
            return self._text(path, value)
        except _CannotResolve as error:
            return Unresolved(value, str(error))

    def _text(self, path: tuple[str, ...], text: str) -> Any:
        """Replace references from the innermost outwards. One that is the whole text keeps its type."""
        while match := _INNERMOST.search(text):
            value = self._reference(path, match[1].strip())
            if match[0] == text:
                return value
            text = text[: match.start()] + ("null" if value is None else str(value)) + text[match.end() :]
        if "${" in text:
            raise _CannotResolve("its braces do not match")
        return text

    def _reference(self, path: tuple[str, ...], name: str) -> Any:
        resolver, colon, argument = name.partition(":")
        if not colon:
            return self._other(path, name)
        first, comma, default = argument.partition(",")
        if resolver == "oc.env":
            if first not in self._environment and not comma:
                raise _CannotResolve(f"the environment has no {first}")
            return self._environment.get(first, default.strip().strip("'\""))
        if resolver == "oc.select":
            try:
                return self._other(path, first)
            except _CannotResolve:
                return _plain(default) if comma else None
        if resolver == "oc.decode":
            return _plain(argument)
        raise _CannotResolve(f"{resolver!r} is computed by the other program")

    def _other(self, path: tuple[str, ...], name: str) -> Any:
        """The value of another key, which may be an interpolation itself; leading dots count up from this key's section."""
        dots = len(name) - len(name.lstrip("."))
        target = (*(path[:-dots] if dots else ()), *name.lstrip(".").split("."))
        if target in self._open or target == path:
            raise _CannotResolve("it refers to itself")
        value = self._written(target)
        self._open.append(target)
        try:
            value = self._value(target, value)
        finally:
            self._open.pop()
        if isinstance(value, Unresolved):
            raise _CannotResolve(value.why)
        return value

    def _written(self, target: tuple[str, ...]) -> Any:
        """What stands at a key, or the framework's default."""
        value: Any = self._tree
        for part in target:
            if not isinstance(value, Mapping) or part not in value:
                key = ".".join(target)
                if key not in self._defaults:
                    raise _CannotResolve(f"there is no {key}")
                return self._defaults[key]
            value = value[part]
        return value


def _unresolved(value: Any) -> Iterator[Unresolved]:
    """Whatever in a list, or in sections in it, has no value here."""
    if isinstance(value, Unresolved):
        yield value
    for entry in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _unresolved(entry)


def _plain(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
