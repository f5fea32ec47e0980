"""DAPO (Yu et al., arXiv 2503.14476) besides its clip and its token mean: dynamic sampling and the overlong penalty."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlcore.config.algorithm import AlgorithmConfig
from rlcore.types import Score


def has_signal(scores: Sequence[Score]) -> bool:
    """Whether a group's scores differ, failed rewards left out: otherwise every advantage is 0, unless length or KL penalties
    differ (dynamic sampling, section 3.2)."""
    return len({score.value for score in scores if score.value is not None}) > 1


def overlong_penalty(lengths: Tensor, limit: int, config: AlgorithmConfig) -> Tensor:
    """[S] response tokens -> [S] float64 <= 0: 0 up to the last overlong_share of the limit, then linearly down to
    -overlong_penalty at the limit (soft overlong punishment, section 3.4)."""
    margin = config.overlong_share * limit
    return -config.overlong_penalty * ((lengths.double() - (limit - margin)) / margin).clamp(0, 1)
