"""What `rlcore import-config` prints: our run file, and what became of each key of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from rlcore.config.foreign.conversion import Conversion, Entry, nested
from rlcore.config.foreign.interpolation import Unresolved
from rlcore.config.foreign.table import Mapped, Unneeded, Unsupported


def run_file(conversion: Conversion) -> str:
    """The settings as YAML, under a line that says where they are from."""
    table, values = conversion.table, nested(conversion.settings)
    origin = f"# rlcore {table.command}: imported from {table.framework}'s {conversion.source}\n"
    return origin + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def report(conversion: Conversion) -> str:
    """Every key, in groups; a group without entries is left out, but for `unsupported`."""
    groups = _groups(conversion)
    counts = ", ".join(f"{len(lines)} {name}" for name, lines in groups.items() if name in _COUNTED)
    head = f"{conversion.table.framework}, {conversion.source}: {counts}"
    shown = [f"\n{name}:\n" + "\n".join(f"  {line}" for line in lines) for name, lines in groups.items() if lines]
    return "\n".join([head, *shown])


_COUNTED = ("mapped", "changed in meaning", "not needed here", "unsupported")


def _groups(conversion: Conversion) -> dict[str, list[str]]:
    entries = conversion.entries
    given = [(entry, entry.outcome) for entry in entries if entry.theirs]
    return {
        "mapped": [_mapped(entry, one) for entry, one in given if isinstance(one, Mapped) and not one.note],
        "changed in meaning": [_mapped(entry, one) for entry, one in given if isinstance(one, Mapped) and one.note],
        "as there, without a key": [
            f"{_settings(entry.outcome)}: {entry.outcome.note}"
            for entry in entries
            if not entry.theirs and isinstance(entry.outcome, Mapped)
        ],
        "not needed here": [f"{_theirs(entry)}: {one.why}" for entry, one in given if isinstance(one, Unneeded)],
        "unsupported": [f"{_theirs(entry)}: {one.remedy}" for entry, one in given if isinstance(one, Unsupported)],
        "unknown, left out": [f"{key}: {_said(value)}" for key, value in conversion.unknown.items()],
        "to set in the run file": list(_to_set(conversion)),
    }


def _mapped(entry: Entry, outcome: Mapped) -> str:
    note = f"\n      {outcome.note}" if outcome.note else ""
    return f"{_theirs(entry)} -> {_settings(outcome)}{note}"


def _theirs(entry: Entry) -> str:
    return ", ".join(
        f"{key}: {_said(value)}{' (default)' if key in entry.defaults else ''}" for key, value in entry.theirs.items()
    )


def _settings(outcome: Mapped) -> str:
    return ", ".join(f"{key}: {_said(value)}" for key, value in outcome.settings.items()) or "nothing"


def _to_set(conversion: Conversion) -> Iterator[str]:
    for setting, key in conversion.to_set.items():
        yield f"{setting}: {key} is not set; set it there, or {setting} here"


def _said(value: Any) -> str:
    """As YAML has it, in one line."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Unresolved):
        return str(value)
    written = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return written.removesuffix("...\n").strip()
