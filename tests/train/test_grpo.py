"""Advantages and the clipped surrogate, value by value."""

import math

import pytest
import torch

from rlcore.algorithms import grpo
from rlcore.algorithms.loss import policy_loss
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.types import AdvantageInputs, TokenView


def advantages(rewards, groups, valid=None, **settings):
    valid = [True] * len(rewards) if valid is None else valid
    lengths = torch.ones(len(rewards), dtype=torch.int64)
    inputs = AdvantageInputs(
        torch.tensor(rewards), torch.tensor(valid), torch.tensor(groups), lengths, penalties=torch.zeros(len(rewards))
    )
    return grpo.advantages(inputs, AlgorithmConfig(**settings)).tolist()


def view(logprobs, advantages, old=None, ref=None, rollout=None, kl_coef=0.0):
    logprobs = torch.tensor(logprobs, requires_grad=True)
    return logprobs, TokenView(
        logprobs=logprobs, entropy=torch.ones_like(logprobs), sequence=torch.arange(len(logprobs)),
        rollout_logprobs=logprobs.detach() if rollout is None else torch.tensor(rollout),
        advantages=torch.tensor(advantages), ref_logprobs=None if ref is None else torch.tensor(ref),
        old_logprobs=None if old is None else torch.tensor(old), kl_coef=kl_coef,
    )  # fmt: skip


def test_each_group_is_compared_with_itself():
    assert advantages([1.0, 0.0, 5.0, 3.0], [0, 0, 1, 1], advantage_std="none") == [0.5, -0.5, 1.0, -1.0]


@pytest.mark.parametrize(("kind", "deviation"), [("population", 0.5), ("sample", math.sqrt(0.5))])
def test_the_standard_deviation_has_the_chosen_degrees_of_freedom(kind, deviation):
    expected = 0.5 / (deviation + 1e-6)
    assert advantages([1.0, 0.0], [0, 0], advantage_std=kind) == pytest.approx([expected, -expected])


def test_a_group_without_spread_gives_zero_not_nan():
    assert advantages([2.0, 2.0, 2.0], [0, 0, 0]) == [0.0, 0.0, 0.0]


def test_a_failed_reward_neither_learns_nor_moves_its_group():
    with_failure = advantages([1.0, 0.0, 99.0], [0, 0, 0], [True, True, False])
    assert with_failure[:2] == advantages([1.0, 0.0], [0, 0])
    assert with_failure[2] == 0.0


def test_on_policy_the_gradient_is_that_of_the_policy_gradient():
    logprobs, tokens = view([-1.0, -2.0], [0.5, -1.5])
    result = policy_loss(tokens, AlgorithmConfig())
    result.loss.sum().backward()
    assert logprobs.grad.tolist() == [-0.5, 1.5]
    assert result.means["actor/pg_clipfrac"].sum() == 0


def test_low_and_high_clip_stop_the_gradient_on_their_own_side():
    old = [0.0, 0.0, 0.0, 0.0]
    logprobs, tokens = view([math.log(1.25), math.log(1.35), math.log(0.85), math.log(0.75)], [1.0, 1.0, -1.0, -1.0], old=old)
    result = policy_loss(tokens, AlgorithmConfig(clip_low=0.2, clip_high=0.3))
    result.loss.sum().backward()
    assert [gradient != 0 for gradient in logprobs.grad.tolist()] == [True, False, True, False]
    assert result.means["actor/pg_clipfrac"].tolist() == [0, 1, 0, 1]


def test_the_divergence_is_k3_and_zero_at_the_reference():
    _, tokens = view([-1.0, -1.0], [0.0, 0.0], ref=[-1.0, -1.5], kl_coef=0.1)
    result = policy_loss(tokens, AlgorithmConfig(kl_coef=0.1))
    expected = [0.0, math.exp(-0.5) + 0.5 - 1]
    assert result.means["actor/kl_loss"].tolist() == pytest.approx(expected)
    assert result.loss.tolist() == pytest.approx([0.1 * value for value in expected])


def test_the_gap_to_the_engine_is_measured_before_the_update():
    _, tokens = view([-1.0, -2.0], [1.0, 1.0], rollout=[-1.1, -2.0])
    result = policy_loss(tokens, AlgorithmConfig())
    assert result.means["mismatch/mean"].tolist() == pytest.approx([0.1, 0.0], abs=1e-6)
    assert result.maxima["mismatch/max"].max().item() == pytest.approx(0.1, abs=1e-6)
