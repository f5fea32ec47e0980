"""Sample and score a step's prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress

from rlcore.algorithms import dapo
from rlcore.config.schema import RunConfig
from rlcore.config.sections import SamplingConfig
from rlcore.data.prompts import PromptSource
from rlcore.monitor.clock import Clock
from rlcore.runtime.placement import Placement
from rlcore.runtime.pool import results
from rlcore.runtime.roles import Scorer
from rlcore.types import Group, Prompt, Receipt, Sampling, Score

REFILL_SEED = 1 << 24  # seed offset between the refills of a step
STAGES = frozenset({"resharding_to_infer", "data", "image_embeds", "rollout", "reward"})
"""Stages of drawing and scoring samples, which may run for the next step during this one."""


@dataclass(frozen=True)
class Scored:
    """Groups and the score of each of their samples."""

    groups: list[Group]
    scores: list[list[Score]]

    def __add__(self, other: Scored) -> Scored:
        return Scored(self.groups + other.groups, self.scores + other.scores)


@dataclass(frozen=True)
class Sampled:
    """Scored groups of one step, and the receipt of the weights that sampled them."""

    kept: Scored
    replaced: Scored
    receipt: Receipt
    drawn: int  # prompts in the whole run so far
    dropped_long: int  # prompts that were too long, so far


@dataclass(frozen=True)
class Sampler:
    """Draws a step's prompts, samples and scores them."""

    placement: Placement
    reward: Scorer
    source: PromptSource
    config: RunConfig
    clock: Clock

    def __call__(self, number: int, receipt: Receipt) -> Sampled:
        """Sample step `number` with the weights of `receipt`."""
        kept, replaced = collect(self.placement, self.reward, self.draw, self.config, number)
        return Sampled(kept, replaced, receipt, self.source.drawn, self.source.dropped_long)

    def draw(self, count: int) -> Sequence[Prompt]:
        """The next prompts, their images embedded."""
        with self.clock.span("data"):
            prompts = self.source.draw(count)
        return self.placement.encoder.embed(prompts) if self.placement.encoder else prompts


def synced(placement: Placement, clock: Clock) -> Receipt:
    with clock.span("resharding_to_infer"):
        return placement.sync_weights()


def collect(
    placement: Placement, reward: Scorer, draw: Callable[[int], Sequence[Prompt]], config: RunConfig, number: int
) -> tuple[Scored, Scored]:
    """Sample a step's groups and replace those without signal (DAPO's dynamic sampling); returns kept and replaced groups.

    Other prompts are drawn at most algorithm.max_refills times; groups still missing then stay missing, but a step without any
    group with signal keeps the last ones drawn.
    """
    kept, replaced, scored = (Scored([], []) for _ in range(3))
    for refill in range(config.algorithm.max_refills + 1):
        prompts = draw(config.train.prompts_per_step - len(kept.groups))
        seed = config.seed + number + refill * REFILL_SEED
        drawn = placement.rollout.stream(prompts, sampling(config.rollout, config.algorithm.group_size, seed))
        scored = scored_in_order(drawn, reward)
        if not config.algorithm.max_refills:
            return scored, replaced
        signal = [dapo.has_signal(scores) for scores in scored.scores]
        kept += _chosen(scored, signal)
        replaced += _chosen(scored, [not one for one in signal])
        if len(kept.groups) == config.train.prompts_per_step:
            break
    if not kept.groups:
        last = len(scored.groups)
        kept, replaced = scored, Scored(replaced.groups[:-last], replaced.scores[:-last])
    return kept, replaced


def scored_in_order(drawn: Iterable[tuple[int, Group]], reward: Scorer) -> Scored:
    """Start scoring each group as it arrives, while engines in other processes go on; results in prompt order."""
    begun = {place: (group, reward.begin(group)) for place, group in drawn}
    in_order = [begun[place] for place in sorted(begun)]
    return Scored([group for group, _ in in_order], results([scores for _, scores in in_order]))


def sampling(config: SamplingConfig, samples: int, seed: int) -> Sampling:
    return Sampling(samples, config.max_new_tokens, config.temperature, config.top_p, config.top_k, seed)


def _chosen(scored: Scored, wanted: Sequence[bool]) -> Scored:
    return Scored(list(compress(scored.groups, wanted)), list(compress(scored.scores, wanted)))
