"""What the watch needs of Ray: a look at workers on every node, and what a worker's death means in words."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlcore.errors import WorkerDied
from rlcore.pulse import Condition, Place, observe

PATIENCE = 10.0  # seconds for a node to answer


@ray.remote(num_cpus=0)
class Observer:
    """Stands on one node and reads what its workers show, which needs nothing of the workers."""

    def look(self, places: Sequence[Place], with_stacks: bool) -> list[Condition]:
        with ThreadPoolExecutor(len(places)) as pool:
            return list(pool.map(lambda place: observe(place, with_stacks), places))


class Observers:
    """One on each node that has workers."""

    def __init__(self, nodes: Mapping[str, Sequence[Place]]) -> None:
        """`nodes`: by Ray's node id, the workers there."""
        self._nodes, self._closed, self._looking = nodes, False, threading.Lock()
        there = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes}
        self._observers = {node: Observer.options(scheduling_strategy=strategy).remote() for node, strategy in there.items()}

    def look(self, with_stacks: bool) -> list[Condition]:
        """Every worker's condition, in bounded time, from any thread; none after `close`."""
        with self._looking:
            if self._closed:
                return []
            asked = {node: self._observers[node].look.remote(places, with_stacks) for node, places in self._nodes.items()}
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
            return [Condition(place.who, str(place), trouble=reason) for place in self._nodes[node]]


def died(place: Place, method: str, error: RayActorError) -> WorkerDied:
    """What to tell of a worker that ended in the middle of `method`."""
    said = " ".join(str(error).rpartition("Worker exit detail: ")[2].partition(" Some common causes")[0].split())
    if "node has died" in str(error):
        return WorkerDied(
            f"{place.who} ({place}) is lost in `{method}`: its node has left the cluster (switched off, cut off, or its Ray was"
            " stopped); start it again, and go on with --resume"
        )
    return WorkerDied(
        f"{place.who} ({place}) died in `{method}`: {said} Often the kernel's out-of-memory killer: look into dmesg on"
        f" {place.node}; if so lower train.max_tokens_per_microbatch, then go on with --resume"
    )
