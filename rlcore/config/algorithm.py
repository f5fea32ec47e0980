"""The algorithm section, and the presets that an algorithm's name selects."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rlcore.config.sections import Fraction, Strict

PRESETS: dict[str, dict[str, object]] = {
    "grpo": {},
    "dr_grpo": {"advantage_std": "none", "aggregation": "constant"},
    "dapo": {"clip_high": 0.28, "max_refills": 3, "overlong_penalty": 1.0},
    "gspo": {"surrogate": "sequence_clip", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean"},
    "cispo": {"surrogate": "clipped_weight", "clip_low": 1.0, "clip_high": 4.0},
    "rloo": {"advantage": "leave_one_out", "aggregation": "sequence_sum", "kl_in": "reward", "kl_estimator": "kl"},
    "reinforce++": {"advantage": "batch", "kl_in": "reward", "kl_estimator": "kl"},
    "reinforce++_baseline": {"advantage": "batch_over_group", "kl_estimator": "mse"},
    "ppo": {"advantage": "gae", "kl_in": "reward", "kl_estimator": "kl"},
}

LIMITS: dict[str, tuple[float, float]] = {
    "none": (0.0, 1.0),
    "token_tis": (0.0, 2.0),
    "sequence_tis": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "geometric": (0.99, 1.01),
}
"""Limits of the ratio trainer / engine for each correction of `rlcore/algorithms/correction.py`, as their authors report."""


class AlgorithmConfig(Strict):
    name: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "reinforce++_baseline", "ppo"] = "grpo"
    """Preset of the settings that the paper fixes (rlcore/algorithms); explicit settings win."""
    group_size: PositiveInt = 8
    """Samples per prompt."""
    advantage: Literal["group", "leave_one_out", "batch", "batch_over_group", "gae"] = "group"
    """Baseline of a reward: its group's mean, the others of its group, the whole batch (batch_over_group: after subtracting the
    group's mean), or the critic's values."""
    advantage_std: Literal["population", "sample", "none"] = "sample"
    """For advantage group: divide by the group's standard deviation (ddof 0 or 1), or not at all."""
    advantage_eps: PositiveFloat = 1e-6
    surrogate: Literal["clip", "sequence_clip", "clipped_weight"] = "clip"
    """Clip each token's ratio, the response's ratio, or the weight of a token's log-probability."""
    clip_low: Fraction = 0.2
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    diff_clip: PositiveFloat | None = None
    """Upper bound of the log-ratio (ChatLearn)."""
    final_clip: PositiveFloat | None = None
    """Upper bound of a token's policy loss, whatever its advantage (ChatLearn). The bound of dual clip (arXiv 1912.09729) is a
    multiple of |advantage| instead."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "token_mean"
    """Reduction of token losses: mean over tokens; mean over responses of their mean, sum, or sum over a constant length."""
    aggregation_length: PositiveInt | None = None
    """For aggregation constant; unset is rollout.max_new_tokens."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the reference; 0 needs no reference."""
    kl_in: Literal["loss", "reward"] = "loss"
    kl_estimator: Literal["kl", "abs", "mse", "low_var_kl"] = "low_var_kl"
    kl_target: PositiveFloat | None = None
    """Target KL per token of an adaptive kl_coef; unset keeps kl_coef fixed."""
    kl_horizon: PositiveInt = 10_000
    """Samples over which kl_coef adapts: a step of that many changes it by the full relative error, a fifth at most."""
    entropy_coef: float = 0.0
    correction: Literal["none", "token_tis", "sequence_tis", "icepop", "geometric"] = "none"
    """Importance-sampling correction for engine/trainer mismatch: weights truncated per token or response, or tokens or
    responses masked out."""
    correction_low: NonNegativeFloat | None = None
    correction_high: PositiveFloat | None = None
    """Limits of the ratio trainer / engine; unset is what the correction's authors use."""
    mask_truncated: bool = False
    """Mask out responses that ended at max_new_tokens."""
    overlong_penalty: NonNegativeFloat = 0.0
    """Subtracted from the reward of a response of max_new_tokens; grows from 0 over the last overlong_share of that length."""
    overlong_share: Fraction = 0.2
    max_refills: NonNegativeInt = 0
    """Resampling rounds per step for groups whose rewards are all equal (DAPO dynamic sampling)."""
    gae_gamma: Fraction = 1.0
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    value_clip: PositiveFloat = 0.2

    @model_validator(mode="before")
    @classmethod
    def _named_settings(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name, correction = str(values.get("name", "grpo")), str(values.get("correction", "none"))
        limits = dict(zip(("correction_low", "correction_high"), LIMITS.get(correction, ()), strict=False))
        given = {key: value for key, value in values.items() if value is not None or key not in limits}
        return {**limits, **PRESETS.get(name, {}), **given}

    @model_validator(mode="after")
    def _settings_go_together(self) -> AlgorithmConfig:
        compares = self.advantage in ("group", "leave_one_out", "batch_over_group")
        if self.group_size == 1 and compares:
            raise ValueError(
                f"group_size: 1 leaves nothing to compare a sample with under algorithm.advantage {self.advantage}, so every"
                " advantage is 0; use 2 or more"
            )
        if self.max_refills and not compares:
            raise ValueError(
                f"max_refills: {self.max_refills} replaces groups without spread, which algorithm.advantage {self.advantage}"
                " can learn from; set it to 0"
            )
        if self.surrogate == "sequence_clip" and self.kl_in == "reward" and self.kl_coef:
            raise ValueError(
                "kl_in: reward penalizes single tokens, and algorithm.surrogate sequence_clip has one ratio for a whole"
                " response; set algorithm.kl_in=loss"
            )
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("kl_target: needs an algorithm.kl_coef above 0 to start from")
        low, high = self.correction_low, self.correction_high
        if low is not None and high is not None and low >= high:
            raise ValueError(f"correction_low: {low} is not below algorithm.correction_high {high}; swap or spread them")
        return self
