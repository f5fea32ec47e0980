"""What a framework's keys become: the outcomes of a conversion, and the tables that are registered in `rlcore.run_files`.

A table is data. A key's entry is one of `to`, `unneeded`, `unsupported`, `only`, `if_on`, `Below`, or a function of its value.
Keys that mean something only together (a product, a length and a cap) stand in one `Together`, whose function gets all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from rlcore.config.foreign.document import Document
from rlcore.config.foreign.interpolation import Unresolved
from rlcore.config.foreign.values import flag
from rlcore.errors import ConfigError

T = TypeVar("T")
Kind = Callable[[Any], T]
Settings = Mapping[str, Any]  # by dotted key of our run file


@dataclass(frozen=True)
class Mapped:
    """Settings of ours that mean the same. Lists of several entries for one setting are joined."""

    settings: Settings
    note: str = ""  # where the number or its meaning changes: how, with the numbers


@dataclass(frozen=True)
class Unneeded:
    why: str


@dataclass(frozen=True)
class Unsupported:
    remedy: str  # what is missing, and what to do


Outcome = Mapped | Unneeded | Unsupported
Convert = Callable[[Any], Outcome]  # ValueError says what the value must be


def to(setting: str, kind: Kind[Any], note: str = "") -> Convert:
    """The same value under our key."""
    return lambda value: Mapped({setting: kind(value)}, note)


@dataclass(frozen=True)
class Whatever:
    """One outcome for every value, so that the value is not even looked at."""

    outcome: Outcome

    def __call__(self, value: Any) -> Outcome:
        return self.outcome


@dataclass(frozen=True)
class Below:
    """Keys of a section that is free: each under the same name in a section of ours."""

    setting: str

    def __call__(self, value: Any) -> Outcome:
        return Mapped({self.setting: value})

    def named(self, key: str) -> Below:
        return Below(f"{self.setting}.{key.rpartition('.')[2]}")


def unneeded(why: str) -> Convert:
    return Whatever(Unneeded(why))


def unsupported(remedy: str) -> Convert:
    return Whatever(Unsupported(remedy))


def only(neutral: Any, remedy: str, why: str = "it is off") -> Convert:
    """A key without a counterpart, which one value makes meaningless."""
    kind = flag if isinstance(neutral, bool) else lambda value: value
    return lambda value: Unneeded(why) if kind(value) == neutral else Unsupported(remedy)


def if_on(setting: str, entry: str) -> Convert:
    """A switch that adds an entry to a list of ours."""
    return lambda value: Mapped({setting: [entry]}) if flag(value) else Unneeded("it is off")


class Given:
    """Values of the other framework's keys: those of the document, else the framework's own defaults."""

    def __init__(self, document: Document, defaults: Mapping[str, Any], rows: int | None = None) -> None:
        """`rows`: training rows, where the user said how many there are."""
        self.source, self.rows = document.source, rows
        self._values, self._defaults = document.values, defaults

    def __contains__(self, key: str) -> bool:
        """Whether the document sets the key to something."""
        return self._values.get(key) is not None

    def get(self, key: str, kind: Kind[T]) -> T | None:
        """None where the key is not set, or is null. ConfigError names the key of a wrong value."""
        value = self._values[key] if key in self._values else self._defaults.get(key)
        if value is None:
            return None
        return checked(lambda: kind(plain(value)), self.source, key, value)

    def __call__(self, key: str, kind: Kind[T], otherwise: T | None = None) -> T:
        """Likewise, but ConfigError where neither the document nor a default gives a value."""
        value = self.get(key, kind)
        if value is None:
            value = otherwise
        if value is None:
            raise ConfigError(f"{self.source}: {key}: must be set")
        return value

    def error(self, key: str, problem: str) -> ConfigError:
        """The error of a value that does not go with others."""
        return ConfigError(f"{self.source}: {key}: {problem}")


def plain(value: Any) -> Any:
    """The value; ValueError for an interpolation that is not resolved."""
    if isinstance(value, Unresolved):
        raise ValueError(f"cannot be resolved here: {value.why}; give the value as an override")
    return value


def checked(convert: Callable[[], T], source: str, key: str, value: Any) -> T:
    """The result; ConfigError with file, key and value for a ValueError."""
    try:
        return convert()
    except ValueError as error:
        found = str(value) if isinstance(value, Unresolved) else repr(value)
        raise ConfigError(f"{source}: {key}: {error}; it is {found}") from None


@dataclass(frozen=True)
class Together:
    """Keys that are converted as one."""

    keys: tuple[str, ...]
    convert: Callable[[Given], Outcome | Sequence[Outcome]]


@dataclass(frozen=True)
class Table:
    """Every key of a framework's run file. Registered in `rlcore.run_files`."""

    framework: str
    command: str  # ours: grpo, sft
    keys: Mapping[str, Convert]  # `*` stands for a name or a part of one, `**` for several names with their dots
    together: Sequence[Together] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)  # theirs, of keys that matter even where a file leaves them out
    always: Sequence[Mapped] = ()  # what the framework does without having a key for it; `note` says so
    required: Mapping[str, str] = field(default_factory=dict)  # settings of ours that a run needs, and the key that gives them
    check: Callable[[Given], None] = lambda given: None  # ConfigError for a file that is not what this table is about

    def __call__(self, key: str) -> bool:
        """Whether the framework has such a key."""
        return key in self._joined or self.entry(key) is not None

    @property
    def names(self) -> list[str]:
        """Known keys without patterns, for suggestions."""
        return [*(key for key in self.keys if "*" not in key), *self._joined]

    def entry(self, key: str) -> Convert | None:
        """The conversion of a key: its own, else that of the first pattern that fits. None for one of several together."""
        if key in self.keys or key in self._joined:
            return self.keys.get(key)
        found = next((convert for pattern, convert in self._patterns if pattern.fullmatch(key)), None)
        return found.named(key) if isinstance(found, Below) else found

    @cached_property
    def _joined(self) -> set[str]:
        return {key for one in self.together for key in one.keys}

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], Convert]]:
        return [(_pattern(key), convert) for key, convert in self.keys.items() if "*" in key]


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(re.escape(key).replace(r"\*\*", ".+").replace(r"\*", "[^.]*"))


def all_of(keys: Iterable[str], convert: Convert) -> dict[str, Convert]:
    """The same entry for several keys."""
    return dict.fromkeys(keys, convert)
