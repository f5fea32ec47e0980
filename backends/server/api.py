"""The protocol between the rollout over servers and the HTTP API of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlcore.types import NamedTensors, Prompt, Sampling

from .client import Server
from .fleet import Fleet


@dataclass(frozen=True)
class Limits:
    """What a server can take."""

    vocabulary: int  # tokens
    samples: int  # decoded at a time
    bytes: int  # of device memory that it holds


@dataclass(frozen=True)
class Completion:
    """One response as a server gave it, not yet checked."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish: str
    versions: Sequence[str]  # labels of the weights that drew its tokens


@dataclass(frozen=True)
class Answer:
    prompt_token_ids: Sequence[int]  # as the engine read them, images expanded
    completions: Sequence[Completion]


@dataclass(frozen=True)
class Sent:
    """Weights that every server has confirmed to hold."""

    tensors: int
    bytes: int
    check_seconds: float


class EngineApi(Protocol):
    """Paths and fields of one engine's HTTP API. Coroutines run on the fleet's event loop."""

    async def examine(self, server: Server) -> Limits:
        """ConfigError when this server cannot be used: another model, other settings."""
        ...

    def request(self, prompt: Prompt, sampling: Sampling, seed: int) -> tuple[str, Any]:
        """Path and body of a request for all samples of a prompt."""
        ...

    def read(self, answer: Any) -> Answer:
        """Raises KeyError, IndexError, TypeError or ValueError where the answer has another form."""
        ...

    async def progress(self, server: Server) -> float:
        """A number that changes whenever the engine has computed a token."""
        ...

    async def forget(self, server: Server) -> None:
        """Empty the caches of what was computed with earlier weights or prompts."""
        ...

    async def pause(self, server: Server) -> int:
        """Free device memory; returns the bytes still held."""
        ...

    async def resume(self, server: Server) -> int: ...

    def send(self, fleet: Fleet, weights: NamedTensors, version: int) -> Sent:
        """Make all servers of the fleet serve these weights under this version, and have each confirm what it holds. Called
        outside the event loop, by the thread that the weights belong to."""
        ...
