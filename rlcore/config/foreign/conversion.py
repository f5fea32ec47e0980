"""Apply a framework's table to its run file."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlcore.config import loader
from rlcore.config.foreign.document import Document
from rlcore.config.foreign.table import Convert, Given, Mapped, Outcome, Table, Together, Unneeded, Whatever, checked, plain
from rlcore.config.schema import RunConfig
from rlcore.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """What became of one key, or of several together."""

    theirs: Mapping[str, Any]
    outcome: Outcome
    defaults: frozenset[str] = frozenset()  # keys that the document leaves to the framework


@dataclass
class Conversion:
    """Our settings, and what became of every key of the document."""

    table: Table
    source: str
    entries: list[Entry] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)  # keys that the table does not have
    to_set: dict[str, str] = field(default_factory=dict)  # settings of ours that are missing, and the key that gives each

    def add(self, entry: Entry) -> None:
        """Record an outcome; ConfigError where it contradicts another."""
        self.entries.append(entry)
        if isinstance(entry.outcome, Mapped):
            for setting, value in entry.outcome.settings.items():
                self._set(setting, value, entry)

    def _set(self, setting: str, value: Any, entry: Entry) -> None:
        before = self.settings.get(setting, value)
        if isinstance(before, list) and isinstance(value, list):
            value = before + [one for one in value if one not in before]
        elif before != value:
            given = ", ".join(entry.theirs) or self.table.framework
            clash = f"gives {setting} {value!r}, and another key gives {before!r}; change one"
            raise ConfigError(f"{self.source}: {given}: {clash}")
        self.settings[setting] = value


def convert(table: Table, document: Document, rows: int | None = None, skip_unknown: bool = False) -> Conversion:
    """Convert a document. `rows`: number of training rows, which passes over them are counted in.

    ConfigError names keys that the table does not have, unless `skip_unknown`; a value that cannot be converted; settings that
    our run file could not have.
    """
    conversion, given = Conversion(table, document.source), Given(document, table.defaults, rows)
    conversion.unknown = {key: value for key, value in document.values.items() if not table(key)}
    if conversion.unknown and not skip_unknown:
        raise ConfigError("\n".join(_unknown(table, document.source, key) for key in conversion.unknown))
    table.check(given)
    for outcome in table.always:
        conversion.add(Entry({}, outcome))
    for entry in (*_together(table, document, given), *_single(table, document)):
        conversion.add(entry)
    conversion.to_set = {ours: key for ours, key in table.required.items() if ours not in conversion.settings}
    _check_settings(conversion)
    return conversion


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by section, in the order of the schema."""
    values: dict[str, Any] = {}
    for setting, value in settings.items():
        *sections, last = setting.split(".")
        below = values
        for name in sections:
            below = below.setdefault(name, {})
        below[last] = value
    return {name: _ordered(name, values[name]) for name in RunConfig.model_fields if name in values}


def _ordered(section: str, values: Any) -> Any:
    if not isinstance(values, Mapping) or section == "reward":
        return values
    return {name: values[name] for name in loader.fields_of(RunConfig, [section]) if name in values}


def _unknown(table: Table, source: str, key: str) -> str:
    close = difflib.get_close_matches(key, table.names, n=1, cutoff=0.8)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{source}: {key}: is no key that is known of {table.framework}{hint} (--skip-unknown leaves such keys out)"


def _together(table: Table, document: Document, given: Given) -> Iterator[Entry]:
    for one in table.together:
        outcomes = one.convert(given)
        yield from _entries(one, document, given, outcomes if isinstance(outcomes, Sequence) else [outcomes])


def _entries(one: Together, document: Document, given: Given, outcomes: Sequence[Outcome]) -> Iterator[Entry]:
    """The keys, with each outcome; keys that neither side sets are not mentioned."""
    defaults = {key: given.get(key, lambda value: value) for key in one.keys if key not in document.values}
    defaults = {key: value for key, value in defaults.items() if value is not None}
    theirs = {key: document.values[key] for key in one.keys if key in document.values}
    for outcome in outcomes:
        if isinstance(outcome, Mapped) and (theirs or defaults):
            yield Entry(theirs | defaults, outcome, frozenset(defaults))
        elif theirs:
            yield Entry(theirs, outcome)


def _single(table: Table, document: Document) -> Iterator[Entry]:
    values = dict(document.values)
    left_out = {key: value for key, value in table.defaults.items() if key not in values and key in table.keys}
    for key, value in (values | left_out).items():
        if (entry := table.entry(key)) is None:
            continue  # one of several together, or unknown
        outcome = _outcome(entry, document.source, key, value)
        if key in values or isinstance(outcome, Mapped):
            yield Entry({key: value}, outcome, frozenset({key} & left_out.keys()))


def _outcome(entry: Convert, source: str, key: str, value: Any) -> Outcome:
    if isinstance(entry, Whatever):
        return entry.outcome
    if value is None:
        return Unneeded("it is not set")
    return checked(lambda: entry(plain(value)), source, key, value)


def _check_settings(conversion: Conversion) -> None:
    """ConfigError where our settings contradict each other; those still to set are left out of it."""
    values = nested({"model.path": "to-set", **conversion.settings})
    try:
        loader.validate(RunConfig, {"data": {}, **values})
    except ConfigError as error:
        lines = str(error).splitlines()
        raise ConfigError("\n".join(f"{conversion.source}: as a run file of ours: {line}" for line in lines)) from None
