"""Where the roles of a run are: pools of workers, and roles that deal a batch over a pool and join what comes back.

One pool with every role is the integrated worker; several are disaggregated; one whose only worker is this process is local.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from rlcore import critic, registry
from rlcore.config import RunConfig
from rlcore.errors import RlcoreError, WorkerDied
from rlcore.learner import Tally, combined
from rlcore.metrics import Clock, Span
from rlcore.packing import deal
from rlcore.protocols import Reward
from rlcore.recipe import Recipe, recipe
from rlcore.types import Batch, Group, Metrics, Prompt, Receipt, Sampling, Score
from rlcore.watch import Watch
from rlcore.worker import ROLES, Policy, Worker

_PINGS = 5
_AFTERMATH = 5.0  # seconds in which the death of a worker is known here after it has broken others
T = TypeVar("T")


class Member(Protocol):
    """One worker, wherever it runs."""

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Starts the method of `rlcore.worker.Worker`; calls to one member run in order."""
        ...

    def stream(self, method: str, *arguments: Any) -> Iterator[Any]:
        """Starts a method that yields; what it yields, as it does where the worker is in another process."""
        ...


class Here:
    """The worker in this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            with self.worker.pulse.stage(method):
                future.set_result(getattr(self.worker, method)(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def stream(self, method: str, *arguments: Any) -> Iterator[Any]:
        """All at once: whoever consumes it would only hold up this process's own work."""
        with self.worker.pulse.stage(method):
            return iter(list(getattr(self.worker, method)(*arguments)))


class Store:
    """Where a value is put that several workers read, or one reads several times, so that it is sent once. Workers in this
    process need none: what they are given they have."""

    def put(self, value: T) -> T:
        """What stands for the value in what workers are sent; they see the value."""
        return value

    def group(self, group: Group) -> Group:
        """The same for a group, as models read it: put once, however often it is asked for."""
        return group

    def bytes(self) -> int:
        """Pickled between this process and its workers since the last call: the arguments of every call, once for each worker,
        every answer, and what was put here or by a worker, once however many read it."""
        return 0


class Pool:
    """Identical workers, one a device. Neighbours, `sequence` at a time, get the same part of a batch."""

    def __init__(self, members: Sequence[Member], sequence: int = 1, store: Store | None = None) -> None:
        self.members, self.sequence, self.store = members, sequence, store or Store()

    def all(self, method: str, *arguments: Any) -> list[Any]:
        """Every member's answer to the same call."""
        return results([member.call(method, *arguments) for member in self.members])

    def parts(self, method: str, parts: Sequence[Any], neighbours: int) -> list[Any]:
        """The answer to each part, which goes to that many neighbours."""
        sent = self.shared(parts, neighbours)
        calls = [member.call(method, sent[number // neighbours]) for number, member in enumerate(self.members)]
        return results(calls)[::neighbours]

    def shared(self, parts: Sequence[T], readers: int) -> Sequence[T]:
        """The parts as they are sent to that many workers each."""
        return [self.store.put(part) for part in parts] if readers > 1 else parts

    def dealt(self, method: str, batch: Batch, cap: int) -> Tensor:
        """[N] of a method that maps the tokens of a batch to one number a token."""
        tokens = Batch(batch.groups, batch.rollout_logprobs, batch.loss_mask)
        parts, places = zip(*deal(tokens, len(self.members) // self.sequence, cap), strict=True)
        result = torch.empty(len(batch.loss_mask))
        for place, values in zip(places, self.parts(method, self._sent(parts), self.sequence), strict=True):
            result[place] = values
        return result

    def stepped(self, method: str, steps: Sequence[Batch], cap: int, whole_groups: bool) -> Metrics:
        """Optimizer steps of which each rank takes its part; what they report together."""
        dealt = [deal(step, len(self.members) // self.sequence, cap, whole_groups) for step in steps]
        ranks = [self._sent([part for part, _ in parts]) for parts in zip(*dealt, strict=True)]
        tallies = self.parts(method, ranks, self.sequence)
        of_steps = zip(*tallies, strict=True)
        return combined([(_joined(one), step.unit) for step, one in zip(steps, of_steps, strict=True)])

    def _sent(self, parts: Sequence[Batch]) -> list[Batch]:
        """Their groups travel once."""
        return [replace(part, groups=[self.store.group(group) for group in part.groups]) for part in parts]


def even(count: int, parts: int) -> list[range]:
    """0 to `count` in that many stretches, which differ in length by one at most."""
    return [range(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def results(futures: Sequence[Future[Any]]) -> list[Any]:
    """Of all, or the first error of any; of a worker's death and what it broke in the others, the death."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    if any(_unexplained(future) for future in done):
        done, _ = wait(futures, timeout=_AFTERMATH)
    errors = [error for future in done if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if isinstance(error, WorkerDied)), errors[0])
    return [future.result() for future in futures]


class PooledReference:
    def __init__(self, pool: Pool, method: str, cap: int) -> None:
        self.pool, self.method, self.cap = pool, method, cap

    def logprobs(self, batch: Batch) -> Tensor:
        return self.pool.dealt(self.method, batch, self.cap)


class PooledActor(PooledReference):
    """Counts optimizer steps as its workers do."""

    def __init__(self, pool: Pool, way: Recipe, cap: int) -> None:
        super().__init__(pool, "logprobs", cap)
        self.way, self.steps = way, 0

    def update(self, batch: Batch) -> Metrics:
        goal = self.way.objective
        steps = self.way.passes.steps(batch, goal, self.steps)
        self.steps += len(steps)
        return self.pool.stepped("update", steps, self.cap, goal.whole_groups)

    def save(self, folder: Path) -> None:
        """The critic's state too, if there is one."""
        self.pool.all("save", folder)

    def load(self, folder: Path) -> None:
        self.steps = self.pool.all("restore", folder)[0]


class PooledCritic:
    def __init__(self, actor: PooledActor) -> None:
        self.actor = actor

    def values(self, batch: Batch) -> Tensor:
        return self.actor.pool.dealt("values", batch, self.actor.cap)

    def update(self, batch: Batch) -> Metrics:
        steps = self.actor.way.passes.steps(batch, critic.OBJECTIVE, self.actor.steps)
        return critic.named(self.actor.pool.stepped("update_critic", steps, self.actor.cap, whole_groups=False))


class Scorer(Protocol):
    def begin(self, group: Group) -> Future[list[Score]]:
        """Of the group's samples, in order."""
        ...


class InlineReward:
    """Scores in this process, at once."""

    def __init__(self, reward: Reward, clock: Clock) -> None:
        self.reward, self.clock = reward, clock

    def begin(self, group: Group) -> Future[list[Score]]:
        future: Future[list[Score]] = Future()
        with self.clock.span("reward"):
            future.set_result(self.reward.score([group])[0])
        return future


class PooledReward:
    """Workers take turns."""

    def __init__(self, pool: Pool) -> None:
        self._turns = cycle(pool.members)

    def begin(self, group: Group) -> Future[list[Score]]:
        """Without what only models read."""
        row = replace(group.prompt.row, images=())
        bare = replace(group.prompt, row=row, vision=None, position_ids=None)
        return next(self._turns).call("score", replace(group, prompt=bare))


class PooledEncoder:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def embed(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Each worker reads the images of as many prompts as the others, give or take one."""
        visions = [prompt.vision for prompt in prompts]
        parts = [visions[share.start : share.stop] for share in even(len(visions), len(self.pool.members))]
        read = [vision for part in self.pool.parts("embed", parts, neighbours=1) for vision in part]
        return [replace(prompt, vision=vision) for prompt, vision in zip(prompts, read, strict=True)]


class PooledRollout:
    def __init__(self, pool: Pool, devices: int) -> None:
        """`devices` of one engine."""
        self.pool, self.devices = pool, devices

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        groups = dict(self.stream(prompts, sampling))
        return [groups[place] for place in range(len(prompts))]

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, Group]]:
        """Groups of every engine as they are finished. Each engine takes as many prompts as the others, give or take one; a
        prompt's seed is that of its place here."""
        prompts = [self._kept(prompt) for prompt in prompts]
        read = [prompt.for_models() for prompt in prompts]
        shares = even(len(prompts), len(self.pool.members) // self.devices)
        parts = [(read[share.start : share.stop], replace(sampling, first=share.start)) for share in shares]
        sent = self.pool.shared(parts, self.devices)
        calls = [
            member.stream("generate", sent[number // self.devices], number % self.devices == 0)
            for number, member in enumerate(self.pool.members)
        ]
        yield from ((place, Group(prompts[place], samples)) for place, samples in merged(calls))

    def _kept(self, prompt: Prompt) -> Prompt:
        """With pixels that the actor will read too, put where it finds them. Embeddings are there."""
        if prompt.vision is None or "pixel_values" not in prompt.vision:
            return prompt
        return replace(prompt, vision={**prompt.vision, "pixel_values": self.pool.store.put(prompt.vision["pixel_values"])})


def merged(streams: Sequence[Iterator[T]]) -> Iterator[T]:
    """What each yields, as it comes."""
    arrived: queue.SimpleQueue[T | BaseException | None] = queue.SimpleQueue()

    def drain(stream: Iterator[T]) -> None:
        try:
            for item in stream:
                arrived.put(item)
            arrived.put(None)
        except BaseException as error:
            arrived.put(error)

    for stream in streams:
        threading.Thread(target=drain, args=(stream,), daemon=True).start()
    running = len(streams)
    while running:
        item = arrived.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            running -= 1
        else:
            yield item


class Placement:
    """The roles of a run, and the weights that pass between them."""

    def __init__(
        self, config: RunConfig, pools: Mapping[str, Pool], close: Callable[[], None] = lambda: None,
        store: Store | None = None,
    ) -> None:  # fmt: skip
        """`pools`: of each role, and of rewards if they have one; `close` ends their workers; `store`: that of all pools."""
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
        """Whether reference and actor can work at a time."""
        return self._of["reference"] is not self._of["actor"]

    @property
    def devices(self) -> int:
        return sum(len(pool.members) for pool in self.pools)

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def start_engines(self) -> None:
        self._of["rollout"].all("start_engine")

    def load(self, task: str, folder: Path | None = None) -> None:
        """Models of a command (`grpo`, `sft`, `dpo`), from `folder` or what the run starts from."""
        way, cap = recipe(task, self.config), self.config.train.max_tokens_per_microbatch
        results([member.call("load", task, folder) for pool in self.pools for member in pool.members])
        self.encoder = PooledEncoder(self._of["vision"]) if self.config.model.images_are_read_once else None
        self.actor = PooledActor(self._of["actor"], way, cap)
        self.reference = PooledReference(self._of["reference"], "reference_logprobs", cap) if way.compared else None
        self.critic = PooledCritic(self.actor) if task == "grpo" and self.config.critic else None

    def sync_weights(self) -> Receipt:
        """Make the engines serve the actor's weights, if they do not already; the receipt of the weights they serve."""
        if self.receipt is None or set(self._of["rollout"].all("served")) != {self.version}:
            self.receipt = max(self._synced(), key=lambda receipt: receipt.seconds)
        return self.receipt

    def update(self, batch: Batch) -> Metrics:
        """All optimizer steps of this batch: a new version of the weights."""
        result = self.critic.update(batch) if self.critic else {}
        result |= self.actor.update(batch)
        self.version += 1
        return result

    def spans(self) -> list[Span]:
        """What every worker did since the last call, on this process's clock."""
        members = list(self._late)
        return [
            replace(span, start=span.start + self._late[member], end=span.end + self._late[member], worker=number)
            for number, (member, spans) in enumerate(zip(members, self._all("spans"), strict=True), start=1)
            for span in spans
        ]

    def traffic(self) -> Metrics:
        """`placement/bytes`: pickled between this process and the workers since the last call. See `Store.bytes`."""
        return {"placement/bytes": float(self._store.bytes())}

    def memory(self) -> Metrics:
        """Of the worker that holds most."""
        reports = self._all("memory")
        names = dict.fromkeys(name for report in reports for name in report)
        return {name: max(report.get(name, 0.0) for report in reports) for name in names}

    def _synced(self) -> list[Receipt]:
        """Of every engine."""
        actor, rollout = self._of["actor"], self._of["rollout"]
        if actor is rollout:
            return rollout.all("sync", self.version)
        sent = [member.call("send") for member in actor.members]
        return results([*sent, *(member.call("receive", self.version) for member in rollout.members)])[len(sent) :]

    def _all(self, method: str) -> list[Any]:
        return results([member.call(method) for member in self._late])


def local(policy: Policy, watch: Watch) -> Placement:
    """Every role in this process."""
    pool = Pool([Here(Worker(policy, pulse=watch.pulse))])
    return Placement(policy.config, dict.fromkeys(ROLES, pool))


def start(policy: Policy, watch: Watch) -> Placement:
    """The workers that the run file asks for, watched."""
    open_pools: Callable[[Policy, Watch], Placement] = registry.load("placements", policy.config.placement.kind)
    return open_pools(policy, watch)


def _joined(tallies: Sequence[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total += tally
    return total


def _unexplained(future: Future[Any]) -> bool:
    """Whether it failed with something that may have its cause in another worker, such as a connection that broke."""
    return future.exception() is not None and not isinstance(future.exception(), RlcoreError)


def _clock_difference(member: Member) -> float:
    """What to add to the member's clock to have this process's: that of the quickest answer."""
    pings = []
    for _ in range(_PINGS):
        asked = time.perf_counter()
        there = member.call("now").result()
        answered = time.perf_counter()
        pings.append((answered - asked, (asked + answered) / 2 - there))
    return min(pings)[1]
