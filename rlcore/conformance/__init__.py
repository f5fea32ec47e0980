"""`rlcore check`: what every backend must do, as measurements with limits. The contract of a plugin.

Each module is a section: it runs in a process of its own on the device and yields measurements. `goldens.json` holds what the
two small models of `case` give in float64 on a processor (ci/goldens.py computes it, from transformers' own forward pass).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "FAIL", "skipped"]


@dataclass(frozen=True)
class Measurement:
    """One number and what it may be. Faults that are counted may be 0."""

    what: str
    measured: float | None  # None: there is none, and `note` says why
    limit: float = 0.0
    at_least: bool = False  # the limit is the least that it may be
    note: str = ""
    broken: bool = False  # there is none because something failed

    @property
    def verdict(self) -> Verdict:
        if self.measured is None:
            return "FAIL" if self.broken else "skipped"
        within = self.measured >= self.limit if self.at_least else self.measured <= self.limit  # neither holds of nan
        return "pass" if within else "FAIL"
