"""A small engine over HTTP, and its API: it answers with the tokens that it is asked for, and misbehaves as it is told to."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from aiohttp import web
from rlcore_backends.server.api import Answer, Completion, Limits
from rlcore_backends.server.client import Server

VOCABULARY = 100


class SmallEngine:
    """A server in a thread. `seconds`: for each answer. `change`: of an answer, before it is sent."""

    def __init__(self, seconds: float = 0.0, change=None, status: int = 200, healthy: bool = True):
        self.seconds, self.change, self.status, self.healthy = seconds, change, status, healthy
        self.answered = self.broken_off = self.running = self.most = 0
        self.connections: set[str] = set()
        self.progresses = True
        self.breaks: asyncio.Event | None = None
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(10)}"

    async def _start(self) -> int:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_get("/health", self._health)
        app.router.add_get("/count", self._count)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        return site._server.sockets[0].getsockname()[1]

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.connections.add(str(request.transport.get_extra_info("peername")))
        self.running += body["n"]
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.broken_off += 1
            raise
        finally:
            self.running -= body["n"]
        self.answered += 1
        tokens = [body["seed"] % VOCABULARY] * body["length"]
        answer = {"prompt": body["prompt"], "samples": [sample(tokens) for _ in range(body["n"])]}
        if self.change:
            answer = self.change(answer) or answer
        return web.json_response(answer if self.status == 200 else {"error": {"message": "it is not well"}}, status=self.status)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _count(self, request: web.Request) -> web.Response:
        return web.json_response(self.answered if self.progresses else 0)

    def die(self) -> None:
        """Close every connection, and listen no more."""
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(10)


def sample(tokens: list[int]) -> dict[str, Any]:
    return {"tokens": tokens, "logprobs": [-1.0] * len(tokens), "finish": "length", "versions": ["0"]}


class SmallApi:
    """`EngineApi` of the small engine, which has no weights."""

    async def examine(self, server: Server) -> Limits:
        return Limits(vocabulary=VOCABULARY, samples=4, bytes=8)

    def request(self, prompt, sampling, seed):
        body = {"prompt": prompt.token_ids, "n": sampling.samples, "length": sampling.max_new_tokens, "seed": seed}
        return "/generate", body

    def read(self, answer) -> Answer:
        return Answer(
            answer["prompt"],
            [Completion(one["tokens"], one["logprobs"], one["finish"], one["versions"]) for one in answer["samples"]],
        )

    async def progress(self, server: Server) -> float:
        return float(await server.get("/count"))

    async def forget(self, server: Server) -> None:
        await server.get("/health")

    async def pause(self, server: Server) -> int:
        return 0

    async def resume(self, server: Server) -> int:
        return 8

    def send(self, fleet, weights, version):
        raise NotImplementedError
