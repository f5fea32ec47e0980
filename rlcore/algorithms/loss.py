"""The per-token loss that all policy-gradient algorithms share; they differ in surrogate and advantage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from rlcore.algorithms import aggregation, cispo, correction, grpo, gspo
from rlcore.algorithms.kl import divergence
from rlcore.algorithms.objective import Objective, tokens
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.types import TokenLoss, TokenView

Surrogate = Callable[[Tensor, TokenView, AlgorithmConfig], tuple[Tensor, Tensor]]
SURROGATES: dict[str, Surrogate] = {"clip": grpo.surrogate, "sequence_clip": gspo.surrogate, "clipped_weight": cispo.surrogate}


def objective(config: AlgorithmConfig, longest: int) -> Objective:
    """The actor's objective under this algorithm; `longest` is the maximum response length in tokens."""
    return Objective(
        loss=partial(policy_loss, config=config),
        loss_weights=partial(aggregation.loss_weights, config=config, longest=longest),
        denominator=tokens,
    )


def policy_loss(view: TokenView, config: AlgorithmConfig) -> TokenLoss:
    """correction x surrogate + kl_coef x divergence - entropy_coef x entropy, [M]. The old policy is the one before this step's
    updates; with a single update that is the current one, so its log-probabilities are these, detached."""
    old = view.logprobs.detach() if view.old_logprobs is None else view.old_logprobs
    log_ratio = view.logprobs - old
    if config.diff_clip is not None:
        log_ratio = log_ratio.clamp(max=config.diff_clip)
    surrogate, clipped = SURROGATES[config.surrogate](log_ratio, view, config)
    if config.final_clip is not None:
        surrogate = surrogate.clamp(max=config.final_clip)
    gap = old - view.rollout_logprobs
    total = surrogate * correction.correction(gap, view.sequence, config)
    means = {
        "actor/pg_loss": surrogate, "actor/pg_clipfrac": clipped.float(), "actor/ppo_kl": old - view.logprobs,
        "actor/entropy": view.entropy, "mismatch/mean": gap.abs(), "mismatch/k3": gap.exp() - gap - 1,
    }  # fmt: skip
    if view.ref_logprobs is not None and config.kl_in == "loss":
        apart = divergence(view.logprobs, view.ref_logprobs, config.kl_estimator)
        total = total + view.kl_coef * apart
        means["actor/kl_loss"] = apart
    if config.entropy_coef:
        total = total - config.entropy_coef * view.entropy
    maxima = {"mismatch/max": gap.abs(), "actor/ratio_max": log_ratio.exp()}
    return TokenLoss(total, means, maxima, effective={"mismatch/ess": gap.exp()})
