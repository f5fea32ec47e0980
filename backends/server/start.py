"""The servers of a run: started here, or at given addresses."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import distributed

from rlcore.config.sections import Strict
from rlcore.errors import ConfigError, RunError

from ..common import node_address
from .client import Server
from .fleet import Fleet
from .process import ServerProcess

_HERE = "127.0.0.1"
_BETWEEN = 0.2  # seconds between two health checks of a server that starts


class ServerOptions(Strict):
    """`rollout.options` of engines that are HTTP servers."""

    addresses: list[str] = Field(default_factory=list)
    """Servers that are there already, http://host:port each; empty starts our own on this machine."""
    servers: PositiveInt = 1
    """Number of servers to start, for each rollout worker."""
    environment: list[dict[str, str]] = Field(default_factory=list)
    """Environment variables of each server to start, for example its devices."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the servers to start, as their command line names them."""
    log_folder: str | None = None
    """Folder for the logs of servers that are started; unset keeps them for error messages only."""
    start_seconds: PositiveFloat = 600.0
    """Seconds a server has to start."""
    stall_seconds: PositiveFloat = 300.0
    """Seconds without a token or an answer after which a server is lost. Keep it below placement.stall_seconds, which ends the
    run."""

    @model_validator(mode="after")
    def _given_or_started(self) -> ServerOptions:
        started = {"servers", "environment", "arguments", "log_folder"} & self.model_fields_set
        if self.addresses and started:
            raise ValueError(f"{min(started)}: is for servers that are started, and addresses names running ones; remove one")
        if self.environment and len(self.environment) != self.servers:
            raise ValueError(f"environment: has {len(self.environment)} entries for {self.servers} servers; give each one")
        for address in self.addresses:
            if not address.startswith(("http://", "https://")):
                raise ValueError(f"addresses: {address!r} is no address; write http://{address}")
        return self


Command = Callable[[str, int], Sequence[str]]


def fleet(
    options: ServerOptions, command: Command, environment: Mapping[str, str], beat: Callable[[], None]
) -> Fleet:  # fmt: skip
    """The servers of this worker, ready. `command` starts one at a host and port, with `environment`. ConfigError for one that
    does not start or answer."""
    if options.addresses:
        servers = [Server(address, options.stall_seconds) for address in _share(options.addresses)]
    else:
        servers = [_started(options, command, environment, number) for number in range(options.servers)]
    made = Fleet(servers, options.stall_seconds, beat)
    patience = 0.0 if options.addresses else options.start_seconds
    made.loop.run(_all_ready(servers, time.monotonic() + patience))
    return made


def _share(addresses: Sequence[str]) -> Sequence[str]:
    """Those of this worker, where several share them."""
    if not distributed.is_initialized():
        return addresses
    rank, size = distributed.get_rank(), distributed.get_world_size()
    if len(addresses) < size:
        raise ConfigError(f"rollout.options.addresses: {len(addresses)} servers for {size} rollout workers; give each one")
    return addresses[rank::size]


def _started(options: ServerOptions, command: Command, environment: Mapping[str, str], number: int) -> Server:
    endpoint = node_address.free_endpoint(_HERE)
    variables = {**os.environ, **environment, **(options.environment[number] if options.environment else {})}
    log = None
    if options.log_folder:
        Path(options.log_folder).mkdir(parents=True, exist_ok=True)
        log = Path(options.log_folder, f"server-{endpoint.rpartition(':')[2]}.log")
    process = ServerProcess(command(_HERE, int(endpoint.rpartition(":")[2])), variables, log)
    return Server(f"http://{endpoint}", options.stall_seconds, process)


async def _all_ready(servers: Sequence[Server], until: float) -> None:
    await asyncio.gather(*(_ready(server, until) for server in servers))


async def _ready(server: Server, until: float) -> None:
    """Wait for a server's health check."""
    while True:
        try:
            await server.get("/health")
            return
        except RunError as error:
            if time.monotonic() >= until or (server.process and server.process.ended()):
                whole = " (rollout.options.log_folder keeps the whole log)" if server.process else ""
                raise ConfigError(f"rollout.engine: {error}{await asyncio.to_thread(server.end)}{whole}") from None
            await asyncio.sleep(_BETWEEN)
