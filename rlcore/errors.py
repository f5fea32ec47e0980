"""Exceptions of rlcore. The command line turns each class into its exit status (`status`)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any


class RlcoreError(Exception):
    """Base of rlcore's errors; the message names the thing, the numbers and the remedy."""

    status = 1


class ConfigError(RlcoreError):
    """The user's mistake: a setting, a file, a row."""

    status = 2


class PluginError(ConfigError):
    """A requested plugin is missing or broken."""


class RunError(RlcoreError):
    """The run failed: weights that did not arrive, an engine that answers wrongly."""


class Unwritten(RunError):
    """A file could not be written, most often because the disk is full."""


class WorkerDied(RunError):
    """A worker's process is gone; errors of the others (a broken connection) are only the consequence."""


class NonFinite(RunError):
    """A loss or gradient is NaN or infinite; raised before the optimizer step."""

    def __init__(self, message: str, report: Mapping[str, Any]) -> None:
        """`report`: the samples and the numbers, JSON-serializable."""
        super().__init__(message, report)
        self.report = report

    def __str__(self) -> str:
        return str(self.args[0])


def nearest(name: str, names: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or the list of names."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(names)}" if names else ""
