"""One measurement of a backend, against its limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "FAIL", "skipped"]


@dataclass(frozen=True)
class Measurement:
    """One number and its limit. Counts of faults have the limit 0."""

    what: str
    measured: float | None  # None: not measured, and `note` says why
    limit: float = 0.0
    at_least: bool = False  # the limit is a lower bound
    note: str = ""
    broken: bool = False  # not measured because something failed

    @property
    def verdict(self) -> Verdict:
        if self.measured is None:
            return "FAIL" if self.broken else "skipped"
        within = self.measured >= self.limit if self.at_least else self.measured <= self.limit  # both are False for nan
        return "pass" if within else "FAIL"
