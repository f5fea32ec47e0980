"""Ray's part of the watchdog: observe workers on every node, and explain a worker's death."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlcore.errors import WorkerDied
from rlcore.monitor.heartbeat import Condition, ProcessHandle, observe

PATIENCE = 10.0  # seconds for a node to answer


@ray.remote(num_cpus=0)
class Observer:
    """Actor on one node that reads its workers' heartbeats, without involving the workers."""

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


def died(who: str, where: str, method: str, error: RayActorError) -> WorkerDied:
    """Error for a worker that died while running `method`."""
    said = " ".join(str(error).rpartition("Worker exit detail: ")[2].split())
    if "node has died" in str(error):
        cause = "its node has left the cluster: switched off, cut off, or its Ray was stopped"
    elif "connection error code" in said:  # all Ray knows of a process that reported nothing
        cause = "killed (for want of memory, if dmesg on that node says so) or crashed (then its log has the stacks)"
    else:
        cause = said
    again = "--resume, or placement.max_restarts, goes on from the last checkpoint"
    return WorkerDied(f"{who} ({where}) died in `{method}`: {cause}; {again}")
