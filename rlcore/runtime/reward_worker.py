"""Rewards in a process of their own, called as a placement calls workers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rlcore.config.sections import RewardConfig
from rlcore.monitor.clock import Clock, Span
from rlcore.rewards.runner import RewardFunctions
from rlcore.runtime.memory import memory
from rlcore.types import Group, Metrics, Score


class RewardWorker:
    """Scores groups; holds no device."""

    def __init__(self, configs: Mapping[str, Sequence[RewardConfig]]) -> None:
        self.rewards, self.clock = RewardFunctions(configs), Clock()

    def score(self, group: Group) -> list[Score]:
        with self.clock.span("reward"):
            return self.rewards.score([group])[0]

    def now(self) -> float:
        return time.perf_counter()

    def spans(self) -> list[Span]:
        """Spans since the last call, on this process's clock."""
        return self.clock.take()

    def memory(self) -> Metrics:
        return memory()
