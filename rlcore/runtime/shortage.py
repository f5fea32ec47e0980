"""Allocations that fail, recognized in the worker: there the stage is known, and what else holds memory."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rlcore.errors import OutOfMemory, Shortage
from rlcore.model.packing import longest, planned
from rlcore.runtime.worker import Worker
from rlcore.types import Batch

_SAID = 400  # most characters of an allocator's message
_ORIGIN = re.compile(r"^\[enforce fail at [^]]*\] [^.]*\. ")  # a place in torch's own source


@contextmanager
def recognized(worker: object, stage: str, arguments: Sequence[Any]) -> Iterator[None]:
    """Within a call of a worker's method: raise OutOfMemory in place of an error that an allocation caused. The failed call's
    frames are cleared, so that its tensors are freed and the worker can still save. A worker without a device is left alone."""
    try:
        yield
    except Exception as error:
        if not isinstance(worker, Worker) or (found := _shortage(worker, error, stage)) is None:
            raise
        found = replace(found, **_measured(worker, arguments), trace="".join(traceback.format_exception(error)))
        for one in _chain(error):
            traceback.clear_frames(one.__traceback__)
        raise OutOfMemory(found) from None


def _shortage(worker: Worker, error: Exception, stage: str) -> Shortage | None:
    for one in _chain(error):
        if isinstance(one, OutOfMemory):
            return replace(one.shortage, stage=stage)
        if memory := worker.resolved.backend.shortage(one):
            relief = tuple(worker.rollout.relief()) if worker.rollout else ()
            return Shortage(stage, memory, _ORIGIN.sub("", " ".join(str(one).split()))[:_SAID] or repr(one), relief=relief)
    return None


def _measured(worker: Worker, arguments: Sequence[Any]) -> dict[str, Any]:
    """What the roles hold, what is free, and the sizes of the call's packed rows."""
    batches = list(_batches(arguments))
    rows = [row for batch in batches for row in planned(batch, worker.resolved.settings.max_tokens)]
    return {
        "held": worker.memory_manager.held(), "free": worker.resolved.backend.free_memory(),
        "tokens": max((sum(piece.tokens for piece in row) for row in rows), default=0),
        "longest": max((longest(batch, worker.whole_groups) for batch in batches), default=0),
    }  # fmt: skip


def _batches(arguments: Sequence[Any]) -> Iterator[Batch]:
    for argument in arguments:
        for one in argument if isinstance(argument, list | tuple) else [argument]:
            if isinstance(one, Batch):
                yield one


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
