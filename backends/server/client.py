"""One HTTP server of an engine, as its client sees it: JSON requests, and errors that name the server and the request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from rlcore.errors import RunError

from .process import ServerProcess

_DEATH = 3.0  # seconds for the process of a lost server to be gone by itself
_QUOTED = 500  # characters of an answer, in an error


class ServerLost(RunError):
    """A server is gone or answers no more; others may take over its requests."""


class WrongAnswer(RunError):
    """A server refused a request, or its answer cannot be right."""


class Server:
    """A server at an address. Its methods run on one event loop."""

    def __init__(self, address: str, seconds: float, process: ServerProcess | None = None) -> None:
        """`seconds`: for an answer to every request but one for samples. `process`: if we started it."""
        self.address, self.process = address.rstrip("/"), process
        self.seconds = seconds
        self.samples = self.tokens = 0  # outstanding: requested and not yet answered
        self._session: aiohttp.ClientSession | None = None
        self._lost: asyncio.Future[None] | None = None

    def __str__(self) -> str:
        return f"the server {self.address}" + (f" (pid {self.process.pid})" if self.process else "")

    async def get(self, path: str) -> str:
        """Text of the answer."""
        return await self._asked("GET", path, None, {}, self.seconds)

    async def post(self, path: str, body: Any = None, limited: bool = True, **query: str) -> Any:
        """The answer, parsed if it is JSON. Without `limited` it may take any time: `lose` ends the wait."""
        text = await self._asked("POST", path, body, query, self.seconds if limited else None)
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise WrongAnswer(f"{self} answered POST {path} with what is no JSON: {text[:_QUOTED]!r}") from None

    async def answers(self) -> bool:
        """Whether it answers its health check."""
        try:
            await self.get("/health")
        except RunError:
            return False
        return True

    def lose(self, why: str) -> None:
        """End all its requests, and those to come, with ServerLost."""
        lost = self._alive()
        if not lost.done():
            lost.set_exception(ServerLost(f"{self} {why}"))
            lost.exception()  # read: a future whose error nobody reads is reported

    def end(self) -> str:
        """End the process if it is ours; how it ended, and the end of its log."""
        if self.process is None:
            return ""
        ended = self.process.ended(_DEATH) or "it was still running"
        self.process.stop()
        return f"; {ended}; the end of its log:\n{self.process.last_lines()}\n"

    async def close(self) -> None:
        if self._session:
            await self._session.close()
            self._session = None

    async def _asked(self, method: str, path: str, body: Any, query: Mapping[str, str], seconds: float | None) -> str:
        lost = self._alive()
        work = asyncio.ensure_future(self._answer(method, path, body, query))
        try:
            await asyncio.wait({work, lost}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if not lost.done():
                self.lose(f"has not answered {method} {path} for {seconds:g} s")
            await lost
            raise AssertionError("a lost server has an error")
        finally:
            work.cancel()

    async def _answer(self, method: str, path: str, body: Any, query: Mapping[str, str]) -> str:
        session = self._connected()
        try:
            async with session.request(method, self.address + path, json=body, params=query) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, OSError) as error:
            raise ServerLost(f"{self} broke off {method} {path}: {error or type(error).__name__}") from error
        if answer.status >= 500 and (path == "/health" or not await self.answers()):
            raise ServerLost(f"{self} answered {method} {path} with {answer.status}: {_reason(text)}")
        if answer.status >= 400:
            raise WrongAnswer(f"{self} answered {method} {path} with {answer.status}: {_reason(text)}")
        return text

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            connections = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)  # uvicorn closes idle ones after 5 s
            self._session = aiohttp.ClientSession(connector=connections, timeout=aiohttp.ClientTimeout(total=None))
        return self._session

    def _alive(self) -> asyncio.Future[None]:
        if self._lost is None:
            self._lost = asyncio.get_running_loop().create_future()
        return self._lost


def _reason(text: str) -> str:
    """The message of an OpenAI-style error, or what else the answer says."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text[:_QUOTED]
