"""Pools of identical workers, one per device, and how calls and batches are split over them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from rlcore.errors import RlcoreError, WorkerDied
from rlcore.model.optimizer import StepStatistics, combined
from rlcore.model.packing import deal
from rlcore.monitor.clock import Span
from rlcore.runtime.shortage import recognized
from rlcore.runtime.worker import Worker
from rlcore.types import Batch, Group, Metrics

_DEATH_GRACE = 5.0  # seconds of grace for the report of a death that caused other errors
T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


class AnyWorker(Protocol):
    """Reports common to workers of every kind."""

    def now(self) -> float: ...

    def spans(self) -> list[Span]: ...

    def memory(self) -> Metrics: ...


class Member(Protocol):
    """One worker, local or remote. A call names the method, `member.call(Worker.load, ...)`, and runs that of the member's own
    class."""

    def call(self, method: Callable[Concatenate[Any, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Start the method; calls to one member run in order."""
        ...

    def stream(self, method: Callable[Concatenate[Any, P], Iterator[R]], *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        """Start a generator method and yield its items; from another process, as they come."""
        ...


class Here:
    """The worker in this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def call(self, method: Callable[Concatenate[Any, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        try:
            with self.worker.heartbeat.stage(method.__name__), recognized(self.worker, method.__name__, args):
                future.set_result(getattr(self.worker, method.__name__)(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def stream(self, method: Callable[Concatenate[Any, P], Iterator[R]], *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        """Run to the end first: the consumer would only hold up this process's own work."""
        with self.worker.heartbeat.stage(method.__name__), recognized(self.worker, method.__name__, args):
            return iter(list(getattr(self.worker, method.__name__)(*args, **kwargs)))


class Store:
    """Holds values that several workers read, or one reads several times, so that each is sent once. This one, for workers
    in this process, passes them through."""

    def put(self, value: T) -> T:
        """Store a value; returns a reference to send in its place, which workers see as the value."""
        return value

    def group(self, group: Group) -> Group:
        """Store a group as models read it, once however often it is requested; returns the reference."""
        return group

    def bytes(self) -> int:
        """Bytes pickled between this process and its workers since the last call: the arguments of every call, once per worker,
        every answer, and every value stored here or by a worker, once however many read it."""
        return 0


class Pool:
    """Identical workers, one per device. Each `sequence` adjacent workers get the same part of a batch."""

    def __init__(self, members: Sequence[Member], sequence: int = 1, store: Store | None = None) -> None:
        self.members, self.sequence, self.store = members, sequence, store or Store()

    def all(self, method: Callable[Concatenate[Any, P], R], *args: P.args, **kwargs: P.kwargs) -> list[R]:
        """Call the method on every member; results in order."""
        return results([member.call(method, *args, **kwargs) for member in self.members])

    def parts(self, method: Callable[[Any, T], R], parts: Sequence[T], neighbours: int) -> list[R]:
        """Send part i to `neighbours` adjacent workers; one result per part."""
        sent = self.shared(parts, neighbours)
        calls = [member.call(method, sent[number // neighbours]) for number, member in enumerate(self.members)]
        return results(calls)[::neighbours]

    def shared(self, parts: Sequence[T], readers: int) -> Sequence[T]:
        """Store the parts if several workers read each."""
        return [self.store.put(part) for part in parts] if readers > 1 else parts

    def dealt(self, method: Callable[[Any, Batch], Tensor], batch: Batch, cap: int) -> Tensor:
        """Split a batch over the pool for a method that returns one number per token; joined to [N]."""
        tokens = Batch(batch.groups, batch.rollout_logprobs, batch.loss_mask)
        parts, places = zip(*deal(tokens, len(self.members) // self.sequence, cap), strict=True)
        result = torch.empty(len(batch.loss_mask))
        for place, values in zip(places, self.parts(method, self._sent(parts), self.sequence), strict=True):
            result[place] = values
        return result

    def stepped(
        self, method: Callable[[Any, Sequence[Batch]], list[StepStatistics]], steps: Sequence[Batch], cap: int,
        whole_groups: bool,
    ) -> Metrics:  # fmt: skip
        """Run optimizer steps, each split over the ranks; returns their combined metrics."""
        dealt = [deal(step, len(self.members) // self.sequence, cap, whole_groups) for step in steps]
        ranks = [self._sent([part for part, _ in parts]) for parts in zip(*dealt, strict=True)]
        statistics_of_ranks = self.parts(method, ranks, self.sequence)
        of_steps = zip(*statistics_of_ranks, strict=True)
        return combined([(_joined(one), step.denominator) for step, one in zip(steps, of_steps, strict=True)])

    def _sent(self, parts: Sequence[Batch]) -> list[Batch]:
        """Replace the groups by references, so that each is sent once."""
        return [replace(part, groups=[self.store.group(group) for group in part.groups]) for part in parts]


def even(count: int, parts: int) -> list[range]:
    """Split range(count) into `parts` contiguous ranges whose lengths differ by one at most."""
    return [range(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def results(futures: Sequence[Future[R]]) -> list[R]:
    """All results in order, or the first error; the death of a worker comes before the errors it caused in others."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    if any(_unexplained(future) for future in done):
        done, _ = wait(futures, timeout=_DEATH_GRACE)
    errors = [error for future in done if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if isinstance(error, WorkerDied)), errors[0])
    return [future.result() for future in futures]


def merged(streams: Sequence[Iterator[T]]) -> Iterator[T]:
    """Yield the items of all streams as they arrive."""
    arrived: queue.SimpleQueue[T | BaseException | None] = queue.SimpleQueue()

    def drain(stream: Iterator[T]) -> None:
        try:
            for item in stream:
                arrived.put(item)
            arrived.put(None)
        except BaseException as error:
            arrived.put(error)

    for stream in streams:
        threading.Thread(target=drain, args=(stream,), daemon=True).start()
    running = len(streams)
    while running:
        item = arrived.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            running -= 1
        else:
            yield item


def _joined(statistics_of_ranks: Sequence[StepStatistics]) -> StepStatistics:
    total = StepStatistics()
    for statistics in statistics_of_ranks:
        total += statistics
    return total


def _unexplained(future: Future[Any]) -> bool:
    """Whether it failed with an error that another worker may have caused, such as a broken connection."""
    return future.exception() is not None and not isinstance(future.exception(), RlcoreError)
