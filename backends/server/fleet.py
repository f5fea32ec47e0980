"""Servers that share the requests of a rollout: each goes to the one with least to do, and to another when that one is lost."""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rlcore.errors import RlcoreError, RunError

from .client import Server, ServerLost
from .loop import EventLoop

T = TypeVar("T")
_CLOSING = 5.0  # seconds to close connections at the end


@dataclass(frozen=True)
class Job:
    """A request for samples of one prompt."""

    path: str
    body: Any
    samples: int
    tokens: int  # prompt and response tokens that it may take


class Fleet:
    """The servers that are left. All requests of a call are outstanding at a time, up to `room` samples on each server."""

    def __init__(self, servers: Sequence[Server], seconds: float, beat: Callable[[], None]) -> None:
        """`seconds`: without progress, after which a server with requests counts as lost."""
        self.servers, self.loop = list(servers), EventLoop()
        self.room: dict[Server, int] = {}
        self._seconds, self._beat = seconds, beat
        weakref.finalize(self, _end, self.loop, self.servers)

    def each(self, ask: Callable[[Server], Awaitable[T]]) -> dict[Server, T]:
        """Ask all servers at once. Those that are lost are left out, unless none remains."""
        return self.loop.run(self._each(ask))

    async def generate(
        self, jobs: Sequence[Job], progress: Callable[[Server], Awaitable[float]],
        take: Callable[[int, Server, Any], object],
    ) -> None:  # fmt: skip
        """Give each answer to `take` (index of the job, server, answer) as it arrives. The first error ends the rest."""
        self._changed = asyncio.Condition()
        watches = [asyncio.create_task(self._watch(server, progress)) for server in self.servers]
        try:
            async with asyncio.TaskGroup() as tasks:
                for index, job in enumerate(jobs):
                    tasks.create_task(self._done(index, job, take))
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            for watch in watches:
                watch.cancel()

    async def drop(self, server: Server, error: ServerLost) -> None:
        """Go on without this server; RunError if it was the last."""
        if server not in self.servers:
            return
        self.servers.remove(server)
        server.lose("was given up")
        await server.close()
        message = f"rollout.engine: {error}{await asyncio.to_thread(server.end)}"
        if not self.servers:
            raise RunError(f"{message}; no other server is left to take its requests")
        print(f"warning: {message}; {len(self.servers)} other servers take its requests", file=sys.stderr)

    async def _each(self, ask: Callable[[Server], Awaitable[T]]) -> dict[Server, T]:
        asked = list(self.servers)
        answers = await asyncio.gather(*(ask(server) for server in asked), return_exceptions=True)
        for server, answer in zip(asked, answers, strict=True):
            if isinstance(answer, ServerLost):
                await self.drop(server, answer)
            elif isinstance(answer, BaseException):
                raise answer
        return {one: answer for one, answer in zip(asked, answers, strict=True) if not isinstance(answer, BaseException)}

    async def _done(self, index: int, job: Job, take: Callable[[int, Server, Any], object]) -> None:
        while True:
            server = await self._assigned(job)
            try:
                answer = await server.post(job.path, job.body, limited=False)
            except ServerLost as error:
                await self.drop(server, error)
                continue
            finally:
                await self._released(server, job)
            self._beat()
            take(index, server, answer)
            return

    async def _assigned(self, job: Job) -> Server:
        """The server with the fewest outstanding tokens of those with room for the job."""
        async with self._changed:
            while True:
                free = [one for one in self.servers if not one.samples or one.samples + job.samples <= self.room[one]]
                if free:
                    server = min(free, key=lambda one: one.tokens)
                    server.samples, server.tokens = server.samples + job.samples, server.tokens + job.tokens
                    return server
                await self._changed.wait()

    async def _released(self, server: Server, job: Job) -> None:
        server.samples, server.tokens = server.samples - job.samples, server.tokens - job.tokens
        async with self._changed:
            self._changed.notify_all()

    async def _watch(self, server: Server, progress: Callable[[Server], Awaitable[float]]) -> None:
        """Lose the server when it has requests and has made no progress for too long."""
        last, since = -1.0, asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(min(10.0, self._seconds / 4))
            now = asyncio.get_running_loop().time()
            if not server.samples:
                since = now
                continue
            try:
                count = await progress(server)
            except RunError:
                return  # its requests say so
            if count != last:
                last, since = count, now
                self._beat()
            elif now - since >= self._seconds:
                return server.lose(f"has computed no token for {now - since:.0f} s, with {server.samples} samples to draw")


def _end(loop: EventLoop, servers: Sequence[Server]) -> None:
    loop.end(_close(servers), _CLOSING)
    processes = [server.process for server in servers if server.process]
    for process in processes:
        process.terminate()
    for process in processes:
        process.stop()


async def _close(servers: Sequence[Server]) -> None:
    for server in servers:
        await server.close()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of ours, or else the first."""
    flat = list(_flat(group))
    return next((error for error in flat if isinstance(error, RlcoreError)), flat[0])


def _flat(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [inner for one in error.exceptions for inner in _flat(one)]
    return [error]
