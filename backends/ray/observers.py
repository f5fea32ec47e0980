"""Ray's part of the watchdog: observe workers on every node, and explain a worker's death."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlcore.errors import Shortage, WorkerDied
from rlcore.monitor.heartbeat import Condition, ProcessHandle, observe

PATIENCE = 10.0  # seconds for a node to answer
_EVIDENCE = 3.0  # seconds to look for the cause of a death, less than `results` waits for its report
DEATHS = (RayActorError, OutOfMemoryError)
"""What Ray raises for a call whose worker is gone or cannot be reached."""


@ray.remote(num_cpus=0)
class Observer:
    """Actor on one node that reads its workers' heartbeats, without involving the workers."""

    def __init__(self) -> None:
        self.before = kills()

    def starved(self) -> int:
        """Processes that the kernel has killed for want of memory since this actor started."""
        return kills() - self.before

    def look(self, handles: Sequence[ProcessHandle], with_stacks: bool) -> list[Condition]:
        with ThreadPoolExecutor(len(handles)) as pool:
            return list(pool.map(lambda handle: observe(handle, with_stacks), handles))


class Observers:
    """One `Observer` on each node that has workers."""

    def __init__(self) -> None:
        self._handles: dict[str, list[ProcessHandle]] = {}  # by Ray's node id
        self._observers: dict[str, Any] = {}
        self._closed, self._looking = False, threading.Lock()

    def add(self, node: str, handle: ProcessHandle) -> None:
        """Register a worker on the node with Ray's id `node`."""
        with self._looking:
            self._handles.setdefault(node, []).append(handle)
            if node not in self._observers:
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                self._observers[node] = Observer.options(scheduling_strategy=there).remote()

    def look(self, with_stacks: bool) -> list[Condition]:
        """Every worker's condition, in bounded time, from any thread; none after `close`."""
        with self._looking:
            if self._closed:
                return []
            asked = {node: self._observers[node].look.remote(handles, with_stacks) for node, handles in self._handles.items()}
            if asked:
                ray.wait(list(asked.values()), num_returns=len(asked), timeout=PATIENCE)
            return [one for node, answer in asked.items() for one in self._answer(node, answer)]

    def starved(self, node: str) -> str:
        """How it is known that processes of this node were killed for want of memory; empty if it is not."""
        try:
            count = ray.get(self._observers[node].starved.remote(), timeout=_EVIDENCE)
        except RayError:  # the node is gone too, or this run is ending
            return ""
        return f"by the kernel, which has killed {count} of its node's processes since the run began" if count else ""

    def close(self) -> None:
        with self._looking:
            self._closed = True
            for observer in self._observers.values():
                ray.kill(observer)

    def _answer(self, node: str, answer: ray.ObjectRef) -> list[Condition]:
        try:
            return ray.get(answer, timeout=0)
        except RayError as error:
            reason = f"its node has not answered for {PATIENCE:.0f} s ({type(error).__name__})"
            return [Condition(handle.who, str(handle), trouble=reason) for handle in self._handles[node]]


def kills() -> int:
    """Processes that the kernel has killed for want of memory since this machine started."""
    found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) if found else 0


def died(
    who: str, where: str, method: str, error: BaseException, starved: Callable[[], str] = str, neighbours: int = 1
) -> WorkerDied:
    """Error for a worker that died, or cannot be reached, while running `method`. `starved`: evidence of processes on its node
    that were killed for want of memory, if there is any."""
    said = " ".join(str(error).rpartition("Worker exit detail: ")[2].split())
    reported_nothing = "connection error code" in said
    memory = _ray_killed(str(error)) if isinstance(error, OutOfMemoryError) else starved() if reported_nothing else ""
    if memory:
        cause = f"killed for want of host memory: {memory}"
    elif isinstance(error, ActorUnavailableError):
        cause = "it cannot be reached; the network to its node fails, or the node is too busy to answer"
    elif "node has died" in str(error):
        cause = "its node has left the cluster: switched off, cut off, or its Ray was stopped"
    elif reported_nothing:
        cause = "killed (for want of memory, if dmesg on that node says so) or crashed (then its log has the stacks)"
    else:
        cause = said
    shortage = Shortage(method, "host", memory, f"{who} ({where})", neighbours=neighbours) if memory else None
    again = "--resume, or placement.max_restarts, goes on from the last checkpoint"
    return WorkerDied(f"{who} ({where}) died in `{method}`: {cause}; {again}", shortage)


def _ray_killed(said: str) -> str:
    """Ray's report that it killed a worker, in a line."""
    used = re.search(r"was ([\d.]+)GB used / ([\d.]+)GB limit", said)
    limit = re.search(r"\(([\d.]+%) of \d+B limit\)", said)
    node = f" {used[1]} of {used[2]} GB of its node's memory were in use," if used else ""
    return f"by Ray,{node} more than RAY_memory_usage_threshold{f' ({limit[1]})' if limit else ''} allows"
