"""The two roles in a run over several nodes: the head gathers the nodes and trains; followers join it and stay to its end."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcore.errors import ConfigError, RlcoreError, RunError

from . import cluster
from .cluster import Head, Node, RayNode, Unreachable

LOOK_SECONDS = 1.0
START_SECONDS = 180.0  # for Ray to start on this node; it takes seconds on an idle one
SILENT_SECONDS = 30.0  # without an answer for this long, the head is gone
LEAVE_SECONDS = 20.0
INTERRUPTED = 130
MEMBERS, END = "members", "end"  # keys of the head's notes: the run's nodes, and how it ended


@dataclass(frozen=True)
class NodeSetup:
    """One node's settings in the run."""

    nodes: int
    resources: Mapping[str, float]  # of each node, in Ray's names
    address: str
    head: str  # address:port
    wait_seconds: float
    environment: Mapping[str, str]
    arguments: Sequence[str]  # for `ray start`, beside its name and the head
    folder: Path | None

    @contextlib.contextmanager
    def ray(self, *arguments: str) -> Iterator[RayNode]:
        """Run this node's Ray. Its logs are kept unless `keep_logs` is unset by the end."""
        own = RayNode(self.address, [*arguments, *self.arguments], self.environment, self.folder)
        try:
            with own:
                yield own
        finally:
            if own.keep_logs:
                say(f"Ray's logs are in {own.folder}")


# the head


def lead(setup: NodeSetup, trainer: Sequence[str], port: int, arguments: Sequence[str]) -> int:
    """Run the head's part; the trainer's exit status. arguments: head options of `ray start`."""
    head = Head(setup.head, cluster.read_token(setup.environment))
    with setup.ray("--head", f"--port={port}", *arguments) as own:
        end: dict[str, Any] = {"status": 1, "reason": "the launcher on the head failed"}
        try:
            nodes = gather(setup, own, head)
            status = train(trainer, {**setup.environment, "RAY_ADDRESS": setup.head}, _Watch(head, nodes))
            own.keep_logs = status != 0
            end = {"status": status, "reason": f"the trainer ended with status {status}"}
        except (RlcoreError, KeyboardInterrupt) as error:
            end = {"status": getattr(error, "status", INTERRUPTED), "reason": str(error) or "interrupted on the head"}
            raise
        finally:
            _dismiss(own, head, end)
    return status


def gather(setup: NodeSetup, own: RayNode, head: Head) -> list[Node]:
    """Wait for all nodes of the run with all their devices; the nodes."""
    nodes = started(own, head)
    deadline = time.monotonic() + setup.wait_seconds
    said = 0
    while True:
        if len(nodes) != said:
            said = len(nodes)
            say(f"{said} of {setup.nodes} nodes: {_listed(nodes)}")
        _refuse_misfits(setup, nodes)
        if len(nodes) == setup.nodes:
            break
        if time.monotonic() > deadline:
            raise RunError(_missing(setup, nodes))
        time.sleep(LOOK_SECONDS)
        own.check()
        with contextlib.suppress(Unreachable):  # busy; if Ray had ended, the check would raise
            nodes = head.nodes()
    head.write(MEMBERS, [node.name for node in nodes])
    return nodes


def started(own: RayNode, head: Head) -> list[Node]:
    """Wait for this node's own Ray; the nodes present by then."""
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit:
        time.sleep(LOOK_SECONDS)
        own.check()
        with contextlib.suppress(Unreachable):
            nodes = head.nodes()
            if any(node.name == own.name for node in nodes):
                return nodes
    raise RunError(f"Ray does not start on this node within {START_SECONDS:g} s; its logs are in {own.folder}")


def _missing(setup: NodeSetup, nodes: Sequence[Node]) -> str:
    return (
        f"{setup.nodes - len(nodes)} of {setup.nodes} nodes did not come within {setup.wait_seconds:g} s; there: "
        f"{_listed(nodes)}. Start the same command on each node that is missing, with its way to {setup.head} open and the "
        "head's token; where it runs already, its output says what it waits for. WAIT_SECONDS waits longer"
    )


def _refuse_misfits(setup: NodeSetup, nodes: Sequence[Node]) -> None:
    if len(nodes) > setup.nodes:
        raise ConfigError(
            f"NNODES: {setup.nodes}, but {len(nodes)} nodes came: {_listed(nodes)}; stop the extra ones, or set "
            f"NNODES={len(nodes)} on every node"
        )
    for node in nodes:
        for name, amount in setup.resources.items():
            if (there := node.resources.get(name, 0)) != amount:
                raise ConfigError(
                    f"DEVICES_PER_NODE: {node.address} gives {there:g} {name} and {setup.address} {amount:g}; set the same "
                    "number, of like devices, on every node"
                )


def train(trainer: Sequence[str], environment: Mapping[str, str], look: Callable[[], None] = lambda: None) -> int:
    """Run the trainer, calling `look` meanwhile; its exit status. Interrupts reach it as SIGTERM, the third as SIGKILL."""
    process = cluster.start(trainer, environment)
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGTERM]  # 1st: finish the step; 2nd: abandon it; 3rd: kill
    try:
        while (status := process.poll()) is None:
            try:
                time.sleep(LOOK_SECONDS)
                look()
            except KeyboardInterrupt:
                process.send_signal(signals.pop() if signals else signal.SIGKILL)
    finally:
        cluster.stop(process)
    return status if status >= 0 else 128 - status


class _Watch:
    """Reports each lost node once; the trainer decides what becomes of the run."""

    def __init__(self, head: Head, nodes: Sequence[Node]) -> None:
        self._head, self._nodes = head, list(nodes)

    def __call__(self) -> None:
        with contextlib.suppress(Unreachable):
            alive = {node.name for node in self._head.nodes()}
            for node in [node for node in self._nodes if node.name not in alive]:
                say(f"{node.address} is lost: its Ray has ended or cannot be reached")
                self._nodes.remove(node)


def _dismiss(own: RayNode, head: Head, end: Mapping[str, Any]) -> None:
    """Tell the other nodes how the run ended, and give them time to leave."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the remaining cleanup is short, and must finish
    limit = time.monotonic() + LEAVE_SECONDS
    with contextlib.suppress(Unreachable):
        head.write(END, end)
        while any(node.name != own.name for node in head.nodes()) and time.monotonic() < limit:
            time.sleep(LOOK_SECONDS)


# the followers


def follow(setup: NodeSetup) -> int:
    """Run a follower's part; the trainer's exit status, as reported by the head."""
    head = _find_head(setup)
    with setup.ray(f"--address={setup.head}") as own:
        gives = " and ".join(f"{amount:g} {name}" for name, amount in setup.resources.items())
        say(f"{setup.address} joins the head at {setup.head} with {gives}")
        end = _stay(setup, own, head)
        own.keep_logs = end["status"] != 0
    say(f"the run is over: {end['reason']}")
    return int(end["status"])


def _find_head(setup: NodeSetup) -> Head:
    """Wait for the head to answer; skips one that is ending an earlier run."""
    file = cluster.token_file(setup.environment)
    deadline = time.monotonic() + setup.wait_seconds
    while True:
        problem = f"there is no token at {file}; bring the head's there, or name its file with RAY_AUTH_TOKEN_PATH"
        if cluster.there(file):
            try:
                head = Head(setup.head, cluster.read_token(setup.environment))
                if head.read(END) is None:
                    return head
                problem = f"the run at {setup.head} is ending"
            except Unreachable as error:
                problem = f"{error}; is it started, with this MASTER_ADDR and RAY_PORT?"
        if time.monotonic() > deadline:
            raise RunError(f"{setup.address} waited {setup.wait_seconds:g} s for the head: {problem}")
        time.sleep(LOOK_SECONDS)


def _stay(setup: NodeSetup, own: RayNode, head: Head) -> dict[str, Any]:
    """Wait for the run's end; how it ended. ConfigError when the run started without this node."""
    answered = time.monotonic()
    while time.monotonic() - answered < SILENT_SECONDS:
        time.sleep(LOOK_SECONDS)
        with contextlib.suppress(Unreachable):
            end, members = head.read(END), head.read(MEMBERS)
            answered = time.monotonic()
            if end is not None:
                return dict(end)
            if members is not None and own.name not in members:
                raise ConfigError(
                    f"NNODES: the run at {setup.head} has its {len(members)} nodes, and {setup.address} is one too many"
                )
        own.check()
    raise RunError(
        f"the head at {setup.head} has not answered for {SILENT_SECONDS:g} s: it was killed, or the network between is cut"
    )


def _listed(nodes: Sequence[Node]) -> str:
    return ", ".join(node.address for node in nodes)


def say(line: str) -> None:
    print(f"launch: {line}", flush=True)
