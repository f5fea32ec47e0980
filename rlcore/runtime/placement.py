"""Placement of a run's roles: pools of workers, and roles that split a batch over a pool and join the results.

One pool with every role is colocated (the integrated worker); several are disaggregated; one of this process alone is local.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlcore import registry
from rlcore.algorithms.task import training_task
from rlcore.config.placement import ROLES
from rlcore.config.schema import RunConfig
from rlcore.model.resolved import ResolvedModel
from rlcore.monitor.clock import Span
from rlcore.runtime.pool import AnyWorker, Here, Member, Pool, R, Store, results
from rlcore.runtime.roles import PooledActor, PooledCritic, PooledEncoder, PooledReference, PooledReward, PooledRollout
from rlcore.runtime.watchdog import Watchdog
from rlcore.runtime.worker import Worker
from rlcore.types import Batch, Metrics, Receipt

_PINGS = 5
_BETWEEN_POOLS = frozenset({"send", "receive"})  # calls in which the workers of one pool wait for those of another


class Placement:
    """The roles of a run, and the weight sync between them."""

    def __init__(
        self, config: RunConfig, pools: Mapping[str, Pool], close: Callable[[], None] = lambda: None,
        store: Store | None = None,
    ) -> None:  # fmt: skip
        """`pools`: by role, and of `reward` if it has one; `close` ends their workers; `store`: shared by all pools."""
        self._store = store or Store()
        self.config, self._of, self._close = config, pools, close
        self.pools = list(dict.fromkeys(pool for role, pool in pools.items() if role != "reward"))
        self.reward = PooledReward(pools["reward"]) if "reward" in pools else None
        self.rollout = PooledRollout(pools["rollout"], config.rollout.tensor_parallel)
        self.version = 0
        self.receipt: Receipt | None = None  # of the weights the engines serve
        self._late = {member: _clock_difference(member) for pool in set(pools.values()) for member in pool.members}

    @property
    def compares_elsewhere(self) -> bool:
        """Whether reference and actor can run concurrently."""
        return self._of["reference"] is not self._of["actor"]

    @property
    def devices(self) -> int:
        return sum(len(pool.members) for pool in self.pools)

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def start_engines(self) -> None:
        self._of["rollout"].all(Worker.start_engine)

    def load(self, command: str, folder: Path | None = None, steps: int | None = None) -> None:
        """Load the models of a command (`grpo`, `sft`, `dpo`), from `folder` or the run's initial model. `steps`: of the whole
        run, where the run file gives epochs."""
        task, cap = training_task(command, self.config, steps), self.config.train.max_tokens_per_microbatch
        self.version, self.receipt = 0, None
        results([member.call(Worker.load, command, folder, steps) for pool in self.pools for member in pool.members])
        self.encoder = PooledEncoder(self._of["vision"]) if self.config.model.images_are_read_once else None
        self.actor = PooledActor(self._of["actor"], task, cap)
        self.reference = PooledReference(self._of["reference"], Worker.reference_logprobs, cap) if task.with_reference else None
        self.critic = PooledCritic(self.actor) if command == "grpo" and self.config.critic else None

    def load_encoder(self) -> None:
        """Load the vision encoder alone, for engines that serve the initial model."""
        self._of["vision"].all(Worker.load_encoder)
        self.encoder = PooledEncoder(self._of["vision"]) if self.config.model.images_are_read_once else None

    def sync_weights(self) -> Receipt:
        """Make the engines serve the actor's weights, if they do not already; returns the receipt of the weights they serve."""
        if self.receipt is None or set(self._of["rollout"].all(Worker.served)) != {self.version}:
            self.receipt = max(self._synced(), key=lambda receipt: receipt.seconds)
        return self.receipt

    def update(self, batch: Batch) -> Metrics:
        """Run all optimizer steps of this batch, which make a new version of the weights."""
        result = self.critic.update(batch) if self.critic else {}
        result |= self.actor.update(batch)
        self.version += 1
        return result

    def can_save(self, stage: str, steps: int) -> bool:
        """Whether a call of `stage` that failed on one worker has left the actor as it was after that many optimizer steps, and
        none of its ranks waiting in a collective for the one that failed."""
        roles = {"generate": "rollout", "embed": "vision", "reference_logprobs": "reference"}
        apart = self._of[roles.get(stage, "actor")] is not self._of["actor"] and stage in roles
        alone = stage == "embed" or (stage == "generate" and self.config.rollout.tensor_parallel == 1)
        free = apart or alone or len(self._of["actor"].members) == 1
        return free and stage not in _BETWEEN_POOLS and self.actor.holds(steps)

    def spans(self) -> list[Span]:
        """Spans of every worker since the last call, on this process's clock."""
        members = list(self._late)
        return [
            replace(span, start=span.start + self._late[member], end=span.end + self._late[member], worker=number)
            for number, (member, spans) in enumerate(zip(members, self._all(AnyWorker.spans), strict=True), start=1)
            for span in spans
        ]

    def traffic(self) -> Metrics:
        """`placement/bytes`: bytes pickled between this process and the workers since the last call. See `Store.bytes`."""
        return {"placement/bytes": float(self._store.bytes())}

    def memory(self) -> Metrics:
        """Memory metrics, each from the worker where it is largest."""
        reports = self._all(AnyWorker.memory)
        names = dict.fromkeys(name for report in reports for name in report)
        return {name: max(report.get(name, 0.0) for report in reports) for name in names}

    def _synced(self) -> list[Receipt]:
        """Sync the weights; returns the receipt of every engine."""
        actor, rollout = self._of["actor"], self._of["rollout"]
        if actor is rollout:
            return rollout.all(Worker.sync, self.version)
        calls: list[Future[Any]] = [member.call(Worker.send) for member in actor.members]
        calls += [member.call(Worker.receive, self.version) for member in rollout.members]
        return results(calls)[len(actor.members) :]

    def _all(self, method: Callable[[Any], R]) -> list[R]:
        return results([member.call(method) for member in self._late])


def local(resolved: ResolvedModel, watchdog: Watchdog) -> Placement:
    """Every role in this process."""
    pool = Pool([Here(Worker(resolved, heartbeat=watchdog.heartbeat))])
    return Placement(resolved.config, dict.fromkeys(ROLES, pool))


def start(resolved: ResolvedModel, watchdog: Watchdog) -> Placement:
    """Start the workers that the run file asks for, under the watchdog."""
    open_pools: Callable[[ResolvedModel, Watchdog], Placement] = registry.load("placements", resolved.config.placement.kind)
    return open_pools(resolved, watchdog)


def _clock_difference(member: Member) -> float:
    """Seconds to add to the member's clock to get this process's, from the fastest of several pings."""
    pings = []
    for _ in range(_PINGS):
        asked = time.perf_counter()
        there = member.call(AnyWorker.now).result()
        answered = time.perf_counter()
        pings.append((answered - asked, (asked + answered) / 2 - there))
    return min(pings)[1]
