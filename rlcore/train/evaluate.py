"""Evaluation on held-out rows."""

from __future__ import annotations

from dataclasses import dataclass

from rlcore.config.schema import RunConfig
from rlcore.data.prompts import Prompts, encode_all
from rlcore.data.rows import load_rows
from rlcore.model.resolved import ResolvedModel
from rlcore.runtime.placement import Placement
from rlcore.runtime.roles import Scorer
from rlcore.train.sampling import sampling, scored_in_order
from rlcore.types import Group, Metrics, Score

EVALUATION_SEED = 1 << 31  # far from every step's seed; CPU generators read the lower 32 bits only


@dataclass(frozen=True)
class Evaluation:
    """Samples and scores of the held-out rows."""

    groups: list[Group]
    scores: list[list[Score]]
    dropped_long: int  # rows dropped because their prompt is too long

    def metrics(self) -> Metrics:
        """`eval/score`: mean over rows of the row's mean score. A failed reward counts in `eval/error`, never as 0."""
        values = [[score.value for score in group if score.value is not None] for group in self.scores]
        rows = [sum(row) / len(row) for row in values if row]
        lengths = [len(sample.token_ids) for group in self.groups for sample in group.samples]
        return {
            **({"eval/score": sum(rows) / len(rows)} if rows else {}),
            "eval/rows": float(len(self.groups)),
            "eval/error": float(sum(score.status != "value" for group in self.scores for score in group)),
            "eval/response_length": sum(lengths) / len(lengths),
            "eval/dropped_long": float(self.dropped_long),
        }


def evaluate(placement: Placement, reward: Scorer, held_out: Prompts, config: RunConfig) -> Evaluation:
    """Sample and score every held-out row, under the evaluation's own sampling settings."""
    assert config.evaluation is not None
    placement.sync_weights()
    prompts = placement.encoder.embed(held_out) if placement.encoder else held_out
    drawn = placement.rollout.stream(prompts, sampling(config.evaluation, config.evaluation.samples, EVALUATION_SEED))
    scored = scored_in_order(drawn, reward)
    return Evaluation(scored.groups, scored.scores, held_out.dropped_long)


def held_out_rows(resolved: ResolvedModel) -> Prompts | None:
    data = resolved.config.data
    if resolved.config.evaluation is None or data.eval is None:
        return None
    return encode_all(load_rows(data.eval, "data.eval"), resolved.family, data.max_prompt_tokens, data.long_prompts)


def unread_rows(config: RunConfig) -> str | None:
    """Warning for data.eval without evaluation; no error, since a run may leave its evaluation out for once."""
    if config.data.eval is None:
        return None
    return "data.eval: no row of it is evaluated, because evaluation is not set; add it (evaluation: {}) or remove data.eval"
