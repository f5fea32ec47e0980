"""The roles of a run as the trainer calls them: each splits a batch over its pool and joins the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rlcore.algorithms.task import TrainingTask
from rlcore.model import critic
from rlcore.monitor.clock import Clock
from rlcore.protocols import Reward
from rlcore.runtime.pool import Pool, even, merged
from rlcore.runtime.reward_worker import RewardWorker
from rlcore.runtime.worker import Worker
from rlcore.types import Batch, Group, Metrics, Prompt, Sampling, Score


class PooledReference:
    def __init__(self, pool: Pool, method: Callable[[Any, Batch], Tensor], cap: int) -> None:
        self.pool, self.method, self.cap = pool, method, cap

    def logprobs(self, batch: Batch) -> Tensor:
        return self.pool.dealt(self.method, batch, self.cap)


class PooledActor(PooledReference):
    """Counts optimizer steps as its workers do."""

    def __init__(self, pool: Pool, task: TrainingTask, cap: int) -> None:
        super().__init__(pool, Worker.logprobs, cap)
        self.task, self.steps = task, 0

    def update(self, batch: Batch) -> Metrics:
        goal = self.task.objective
        steps = self.task.schedule.steps(batch, goal, self.steps)
        self.steps += len(steps)
        return self.pool.stepped(Worker.update, steps, self.cap, goal.whole_groups)

    @property
    def ranks(self) -> int:
        return len(self.pool.members)

    def save(self, folder: Path) -> None:
        """Copy the actor's state, and the critic's if there is one; the ranks go on to write it to `folder`."""
        self.pool.all(Worker.save, folder)

    def unwritten(self) -> str | None:
        """Why that failed on some rank; None as far as is known."""
        return next(filter(None, self.pool.all(Worker.unwritten)), None)

    def load(self, folder: Path) -> None:
        self.steps = self.pool.all(Worker.restore, folder)[0]

    def holds(self, steps: int) -> bool:
        """Whether its weights, and the critic's, are those of that many optimizer steps."""
        return all(taken == {steps} for taken in self.pool.all(Worker.steps_taken))


class PooledCritic:
    def __init__(self, actor: PooledActor) -> None:
        self.actor = actor

    def values(self, batch: Batch) -> Tensor:
        return self.actor.pool.dealt(Worker.values, batch, self.actor.cap)

    def update(self, batch: Batch) -> Metrics:
        steps = self.actor.task.schedule.steps(batch, critic.OBJECTIVE, self.actor.steps)
        return critic.named(self.actor.pool.stepped(Worker.update_critic, steps, self.actor.cap, whole_groups=False))


class Scorer(Protocol):
    def begin(self, group: Group) -> Future[list[Score]]:
        """Start scoring; one score per sample of the group, in order."""
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
    """Scores groups on the reward workers, round-robin."""

    def __init__(self, pool: Pool) -> None:
        self._turns = cycle(pool.members)

    def begin(self, group: Group) -> Future[list[Score]]:
        return next(self._turns).call(RewardWorker.score, replace(group, prompt=group.prompt.for_rewards()))


class PooledEncoder:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def embed(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Encode the prompts' images; prompts are split evenly over the workers."""
        visions = [prompt.vision for prompt in prompts]
        parts = [visions[share.start : share.stop] for share in even(len(visions), len(self.pool.members))]
        read = [vision for part in self.pool.parts(Worker.embed, parts, neighbours=1) for vision in part]
        return [replace(prompt, vision=vision) for prompt, vision in zip(prompts, read, strict=True)]


class PooledRollout:
    def __init__(self, pool: Pool, devices: int) -> None:
        """`devices`: per engine."""
        self.pool, self.devices = pool, devices

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        groups = dict(self.stream(prompts, sampling))
        return [groups[place] for place in range(len(prompts))]

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, Group]]:
        """Yield (prompt index, group) as engines finish. Prompts are split evenly; a prompt's seed follows its index, counted
        from `sampling.first`."""
        prompts = [self._kept(prompt) for prompt in prompts]
        read = [prompt.for_models() for prompt in prompts]
        shares = even(len(prompts), len(self.pool.members) // self.devices)
        parts = [(read[share.start : share.stop], replace(sampling, first=sampling.first + share.start)) for share in shares]
        sent = self.pool.shared(parts, self.devices)
        calls = [
            member.stream(Worker.generate, sent[number // self.devices], number % self.devices == 0)
            for number, member in enumerate(self.pool.members)
        ]
        places = ((place - sampling.first, samples) for place, samples in merged(calls))
        yield from ((place, Group(prompts[place], samples)) for place, samples in places)

    def _kept(self, prompt: Prompt) -> Prompt:
        """Store pixel values, since the actor reads them too. Embeddings are in the store already."""
        if prompt.vision is None or "pixel_values" not in prompt.vision:
            return prompt
        return replace(prompt, vision={**prompt.vision, "pixel_values": self.pool.store.put(prompt.vision["pixel_values"])})
