"""Exceptions of rlcore. The command line turns each class into its exit status (`status`)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


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


@dataclass(frozen=True)
class Remedy:
    """A change of the run file to try after a failure."""

    overrides: tuple[str, ...]  # `a.b=value`, for the command line
    now: str  # the values in effect
    why: str
    hardware: bool = False  # needs devices or nodes that may not be there
    anew: bool = False  # rules out resuming this run's checkpoints


@dataclass(frozen=True)
class Shortage:
    """A lack of memory: where it was met, and what is known there."""

    stage: str  # the worker's method
    memory: Literal["device", "host"]
    said: str = ""  # by the allocator
    who: str = ""  # the worker; empty is this process
    step: int | None = None
    held: Mapping[str, int] = field(default_factory=dict)  # bytes on the device, by part (runtime/memory.py)
    free: tuple[int, int] | None = None  # bytes of that memory: free, in all
    tokens: int = 0  # of the longest packed row; 0: unknown
    longest: int = 0  # tokens of the longest piece of a row, which no smaller row could hold
    fits: int = 0  # tokens of the longest sample that the engine's cache could hold; 0: unknown
    neighbours: int = 1  # devices that the worker's pool has on its node
    relief: tuple[Remedy, ...] = ()  # the engine's own, the mildest first
    trace: str = ""  # the traceback


class OutOfMemory(RunError):
    """An allocation failed; the process goes on."""

    def __init__(self, shortage: Shortage) -> None:
        super().__init__(shortage)
        self.shortage = shortage

    def __str__(self) -> str:
        one = self.shortage
        stage = f"`{one.stage}`" if one.stage else "the controller"
        step = "" if one.step is None else f" of step {one.step}"
        return f"out of {one.memory} memory in {stage}{step}{f', {one.who}' if one.who else ''}: {one.said}"


class WorkerDied(RunError):
    """A worker's process is gone; errors of the others (a broken connection) are only the consequence."""

    def __init__(self, message: str, shortage: Shortage | None = None) -> None:
        """`shortage`: of host memory, for which it was killed."""
        super().__init__(message, shortage)
        self.shortage = shortage

    def __str__(self) -> str:
        return str(self.args[0])


class EngineFailed(WorkerDied):
    """An engine raised what is no setting's fault, such as a failed kernel. What it holds cannot be trusted any more."""


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
