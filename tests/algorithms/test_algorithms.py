"""Every algorithm against the papers' formulas in float64 NumPy, response by response, independent of rlcore code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlcore.algorithms import dapo
from rlcore.algorithms.advantages import advantages
from rlcore.algorithms.kl import Controller, divergence
from rlcore.algorithms.loss import objective, policy_loss
from rlcore.algorithms.ppo import value_loss
from rlcore.config.algorithm import PRESETS, AlgorithmConfig
from rlcore.model.optimizer import StepStatistics
from rlcore.types import AdvantageInputs, Batch, Group, Prompt, Row, Sample, Score, TokenView, ValueView

LIMIT = 12  # maximum response length in tokens
GROUPS, SAMPLES = 3, 4
VARIANTS = {
    **{name: {"name": name} for name in PRESETS},
    "grpo, ddof 0": {"advantage_std": "population", "advantage_eps": 1e-5},
    "grpo, ChatLearn's clips": {"diff_clip": 0.3, "final_clip": 0.5},
    "grpo, sequence mean": {"aggregation": "sequence_mean"},
    "grpo, sequence sum": {"aggregation": "sequence_sum"},
    "grpo, constant": {"aggregation": "constant", "aggregation_length": 7},
    "grpo, entropy": {"entropy_coef": 0.01},
    **{f"grpo, {kind} in the loss": {"kl_coef": 0.2, "kl_estimator": kind} for kind in ("kl", "abs", "mse", "low_var_kl")},
    "grpo, in the reward": {"kl_coef": 0.2, "kl_in": "reward"},
    "rloo, in the reward": {"name": "rloo", "kl_coef": 0.2},
    "reinforce++, in the reward": {"name": "reinforce++", "kl_coef": 0.2},
    "reinforce++_baseline, k2": {"name": "reinforce++_baseline", "kl_coef": 0.2},
    "ppo, in the reward": {"name": "ppo", "kl_coef": 0.2, "gae_gamma": 0.97},
    **{f"grpo, {kind}": {"correction": kind} for kind in ("token_tis", "sequence_tis", "icepop")},
    "grpo, token_tis beside a divergence": {"correction": "token_tis", "kl_coef": 0.2},
    "grpo, icepop of a clipped loss": {"correction": "icepop", "correction_low": 0.8, "final_clip": 0.3},
    "grpo, geometric": {"correction": "geometric", "correction_low": 0.95, "correction_high": 1.05},
    "gspo, sequence_tis": {"name": "gspo", "correction": "sequence_tis"},
    "grpo, truncated left out": {"mask_truncated": True},
    "dapo, overlong": {"name": "dapo", "overlong_penalty": 0.7, "overlong_share": 0.5},
}


class Case:
    """Random responses to three prompts and all their per-token values, as lists of float64 arrays."""

    def __init__(self, seed=0):
        random = np.random.default_rng(seed)
        self.lengths = random.integers(1, LIMIT + 1, GROUPS * SAMPLES)
        self.lengths[0] = LIMIT
        self.rewards = np.round(random.uniform(0, 1, GROUPS * SAMPLES), 1)
        self.rewards[SAMPLES : 2 * SAMPLES] = 0.5  # a group of equal rewards
        self.valid = np.ones(GROUPS * SAMPLES, bool)
        self.valid[-1] = False
        self.rewards[-1] = 0
        self.new = [random.normal(-2, 1, n) for n in self.lengths]
        self.old = [each + random.normal(0, 0.2, len(each)) for each in self.new]
        self.engine = [each + random.normal(0, 0.1, len(each)) for each in self.old]
        self.ref = [each + random.normal(0, 0.3, len(each)) for each in self.old]
        self.values = [random.normal(0.5, 0.2, n) for n in self.lengths]
        self.entropy = [random.uniform(0, 3, n) for n in self.lengths]

    def batch(self):
        finish = ["length" if n == LIMIT else "stop" for n in self.lengths]
        samples = [
            Sample([1] * int(n), engine.tolist(), "", end, 0)
            for n, engine, end in zip(self.lengths, self.engine, finish, strict=True)
        ]
        groups = [
            Group(Prompt(Row(str(i), []), [1, 2], [1, 2]), samples[i * SAMPLES : (i + 1) * SAMPLES]) for i in range(GROUPS)
        ]
        return replace(Batch.of(groups), ref_logprobs=flat(self.ref), old_logprobs=flat(self.old), values=flat(self.values))


def flat(parts):
    return torch.tensor(np.concatenate(parts), dtype=torch.float32)


# the papers


def estimate(ahead, kind):
    return {"kl": ahead, "abs": abs(ahead), "mse": ahead**2 / 2, "low_var_kl": np.exp(-ahead) - 1 + ahead}[kind]


def paper_advantages(case, config):
    """One array per response."""
    rewards = case.rewards.copy()
    for i, n in enumerate(case.lengths):
        start = LIMIT * (1 - config.overlong_share)
        if config.overlong_penalty and case.valid[i] and n > start:
            rewards[i] -= config.overlong_penalty * (n - start) / (LIMIT - start)
    penalties = [np.zeros(n) for n in case.lengths]
    if config.kl_in == "reward":
        penalties = [
            config.kl_coef * estimate(old - ref, config.kl_estimator) for old, ref in zip(case.old, case.ref, strict=True)
        ]
    totals = rewards - np.array([each.sum() for each in penalties])
    result = []
    if config.advantage in ("group", "leave_one_out"):
        for i, n in enumerate(case.lengths):
            first = i // SAMPLES * SAMPLES
            mates = [j for j in range(first, first + SAMPLES) if case.valid[j]]
            value = 0.0
            if case.valid[i] and config.advantage == "leave_one_out":
                value = totals[i] - np.mean([totals[j] for j in mates if j != i])
            elif case.valid[i]:
                value = totals[i] - totals[mates].mean()
                if config.advantage_std != "none":
                    value /= totals[mates].std(ddof=config.advantage_std == "sample") + config.advantage_eps
            result.append(np.full(n, value))
        return result
    if config.advantage == "gae":
        for i, n in enumerate(case.lengths):
            earned = -penalties[i]
            earned[-1] += rewards[i]
            after = np.append(case.values[i][1:], 0.0)
            errors = earned + config.gae_gamma * after - case.values[i]
            decay = config.gae_gamma * config.gae_lambda
            result.append(np.array([sum(decay ** (k - t) * errors[k] for k in range(t, n)) for t in range(n)]))
    else:
        if config.advantage == "batch_over_group":
            for first in range(0, len(rewards), SAMPLES):
                mates = [j for j in range(first, first + SAMPLES) if case.valid[j]]
                rewards[mates] -= rewards[mates].mean()
        result = [np.array([rewards[i] - penalties[i][t:].sum() for t in range(n)]) for i, n in enumerate(case.lengths)]
    everyone = np.concatenate([each for each, valid in zip(result, case.valid, strict=True) if valid])
    return [(each - everyone.mean()) / everyone.std() * valid for each, valid in zip(result, case.valid, strict=True)]


def paper_loss(case, new, config, advantages, held):
    """The whole loss at log-probabilities `new`; values under a stop-gradient in the papers come from `held`."""
    counted = case.valid & ~((case.lengths == LIMIT) & config.mask_truncated)
    total, tokens, responses = 0.0, case.lengths[counted].sum(), counted.sum()
    for i in np.flatnonzero(counted):
        n, advantage = case.lengths[i], advantages[i]
        log_ratio = new[i] - case.old[i]
        if config.diff_clip is not None:
            log_ratio = np.minimum(log_ratio, config.diff_clip)
        if config.surrogate == "sequence_clip":
            frozen = held[i] - case.old[i]
            log_ratio = np.full(n, frozen.mean()) + new[i] - held[i]
        ratio = np.exp(log_ratio)
        low, high = 1 - config.clip_low, 1 + config.clip_high
        if config.surrogate == "clipped_weight":
            loss = -np.clip(np.exp(held[i] - case.old[i]), low, high) * advantage * new[i]
        else:
            loss = -np.minimum(ratio * advantage, np.clip(ratio, low, high) * advantage)
        if config.final_clip is not None:
            loss = np.minimum(loss, config.final_clip)
        drift = np.exp(case.old[i] - case.engine[i])
        if config.correction == "token_tis":
            loss = loss * np.minimum(drift, config.correction_high)
        elif config.correction == "sequence_tis":
            loss = loss * min(drift.prod(), config.correction_high)
        elif config.correction == "icepop":
            loss = loss * drift * ((drift >= config.correction_low) & (drift <= config.correction_high))
        elif config.correction == "geometric":
            loss = loss * (config.correction_low <= drift.prod() ** (1 / n) <= config.correction_high)
        if config.kl_coef and config.kl_in == "loss":
            loss = loss + config.kl_coef * estimate(new[i] - case.ref[i], config.kl_estimator)
        loss = loss - config.entropy_coef * case.entropy[i]
        total += {
            "token_mean": loss.sum() / tokens, "sequence_mean": loss.mean() / responses, "sequence_sum": loss.sum() / responses,
            "constant": loss.sum() / responses / (config.aggregation_length or LIMIT),
        }[config.aggregation]  # fmt: skip
    return total


# ours


def our_batch(case, config):
    """The batch as the trainer passes it to the update."""
    from rlcore.config.schema import RunConfig
    from rlcore.train.advantages import advantage_inputs, with_advantages

    sections = {"model": {"path": "x"}, "data": {"train": {}}, "rollout": {"max_new_tokens": LIMIT}}
    critic = {"critic": {}} if config.advantage == "gae" else {}
    run = RunConfig.model_validate({**sections, **critic, "algorithm": config.model_dump()})
    scores = [Score(float(r)) if ok else Score(None, "error") for r, ok in zip(case.rewards, case.valid, strict=True)]
    grouped = [scores[first : first + SAMPLES] for first in range(0, len(scores), SAMPLES)]
    batch = replace(case.batch(), kl_coef=config.kl_coef)
    if not config.kl_coef:
        batch = replace(batch, ref_logprobs=None)
    return with_advantages(batch, advantage_inputs(batch, grouped, run), config)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def config(request):
    return AlgorithmConfig(group_size=SAMPLES, **request.param)


def test_advantages_are_the_papers(config):
    case = Case()
    ours = our_batch(case, config).advantages
    assert torch.allclose(ours, flat(paper_advantages(case, config)), atol=2e-5, rtol=2e-5)


def test_the_loss_and_its_gradient_are_the_papers(config):
    case = Case()
    batch = our_batch(case, config)
    goal = objective(config, LIMIT)
    mask = batch.loss_mask
    logprobs = flat(case.new).requires_grad_()
    view = TokenView(
        logprobs[mask], flat(case.entropy)[mask], batch.sequence[mask].unique_consecutive(return_inverse=True)[1],
        batch.rollout_logprobs[mask], batch.advantages[mask], None if batch.ref_logprobs is None else batch.ref_logprobs[mask],
        batch.old_logprobs[mask], batch.kl_coef,
    )  # fmt: skip
    loss = (goal.loss(view).loss * goal.loss_weights(batch)[mask]).sum()
    loss.backward()

    theirs = paper_advantages(case, config)
    assert loss.item() == pytest.approx(paper_loss(case, case.new, config, theirs, case.new), rel=2e-5, abs=1e-6)
    slopes = []
    for i, row in enumerate(case.new):
        for place in range(len(row)):
            moved = []
            for step in (1e-6, -1e-6):
                shifted = [each.copy() for each in case.new]
                shifted[i][place] += step
                moved.append(paper_loss(case, shifted, config, theirs, case.new))
            slopes.append((moved[0] - moved[1]) / 2e-6)
    assert torch.allclose(logprobs.grad, torch.tensor(slopes, dtype=torch.float32), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_on_policy_every_algorithm_has_ratio_1_and_clips_nothing(name):
    case = Case()
    case.old = case.new
    config = AlgorithmConfig(name=name, group_size=SAMPLES)
    batch = our_batch(case, config)
    view = TokenView(flat(case.new), flat(case.entropy), batch.sequence, batch.rollout_logprobs, batch.advantages)
    result = policy_loss(view, config)
    assert result.means["actor/pg_clipfrac"].sum() == 0
    assert result.maxima["actor/ratio_max"].tolist() == [1.0] * len(batch.loss_mask)


def test_one_sample_a_prompt_compares_with_the_batch_and_is_never_nan():
    config = AlgorithmConfig(name="reinforce++", group_size=1)
    inputs = AdvantageInputs(
        torch.tensor([1.0, 0.0]), torch.tensor([True, True]), torch.tensor([0, 1]), torch.tensor([1, 2]), torch.zeros(3)
    )
    assert advantages(inputs, config)[0].tolist() == pytest.approx([2**0.5, -(0.5**0.5), -(0.5**0.5)])
    for alone in ("group", "leave_one_out"):
        config = AlgorithmConfig(advantage=alone)
        assert advantages(inputs, config)[0].tolist() == [0.0, 0.0, 0.0]


def test_values_learn_the_returns_and_the_clip_holds_them_back():
    values = torch.tensor([0.5, 0.9], requires_grad=True)
    result = value_loss(ValueView(values, torch.tensor([0.5, 0.5]), torch.tensor([1.0, 1.0])), clip=0.2)
    result.loss.sum().backward()
    assert result.loss.tolist() == pytest.approx([0.125, 0.045])
    assert values.grad.tolist() == pytest.approx([-0.5, 0.0])


def test_a_value_that_is_not_held_back_is_not_counted_as_clipped():
    """In float32, old + (new - old) != new near 0."""
    random = torch.Generator().manual_seed(0)
    old = torch.randn(10_000, generator=random)
    values = torch.randn(10_000, generator=random) * 1e-3
    near = (values - old).abs() < 5
    result = value_loss(ValueView(values[near], old[near], torch.randn(int(near.sum()), generator=random)), clip=5)
    assert result.means["critic/clipfrac"].sum() == 0


EXACT = {
    **{f"group, {std}": {"advantage": "group", "advantage_std": std} for std in ("population", "sample", "none")},
    **{kind: {"advantage": kind} for kind in ("leave_one_out", "batch", "batch_over_group")},
    "gae": {"advantage": "gae", "gae_lambda": 1.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("settings", EXACT.values(), ids=EXACT)
def test_equal_rewards_have_no_advantage_whatever_their_value_and_number(settings, dtype):
    """Even in float64 a mean of equal numbers rounds. Estimators that compare within a group need groups that differ."""
    config, random = AlgorithmConfig(**settings), np.random.default_rng(0)
    beside = 0.0 if config.advantage in ("group", "leave_one_out", "batch_over_group") else None
    for size in (1, 2, 3, 5, 6, 7, 11, 30, 38, 64, 100):
        for value in (0.1, 0.3, 0.7, 0.9, 1.1, 3.3, 10.1, 1000.1, -0.9, 1e-9, 1 / 3, *random.normal(0, 10, 5)):
            rewards = torch.tensor([value] * size + [value if beside is None else beside] * size, dtype=dtype)
            lengths = torch.from_numpy(random.integers(1, 5, 2 * size))
            tokens, groups = int(lengths.sum()), torch.tensor([0, 1]).repeat_interleave(size)
            inputs = AdvantageInputs(
                rewards, rewards == rewards, groups, lengths, torch.zeros(tokens, dtype=dtype), torch.zeros(tokens)
            )
            given, _ = advantages(inputs, config)
            assert given.dtype == torch.float32 and not given.any(), (size, value)


def test_a_single_sample_is_not_divided_by_its_own_deviation():
    inputs = AdvantageInputs(torch.tensor([0.9]), torch.tensor([True]), torch.tensor([0]), torch.tensor([3]), torch.zeros(3))
    assert advantages(inputs, AlgorithmConfig(name="reinforce++", group_size=1))[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", PRESETS)
def test_scores_that_are_equal_teach_nothing_with_a_penalty_on_length_either(name):
    case = Case()
    case.lengths[:], case.rewards[:], case.valid[:] = LIMIT, 0.9, True
    case.old = case.new = case.engine = case.ref = [np.full(LIMIT, -1.0)] * len(case.lengths)
    case.values = [np.full(LIMIT, 0.25)] * len(case.lengths)
    config = AlgorithmConfig(
        name=name, group_size=SAMPLES, overlong_penalty=0.7, gae_lambda=1, kl_coef=0.1 if name != "gspo" else 0
    )
    assert not our_batch(case, config).advantages.any()


def test_scores_are_compared_in_double_precision():
    """Two scores that float32 cannot distinguish."""
    case = Case()
    case.rewards[:], case.rewards[:2], case.valid[:] = 1000.0, (1000.0, 1000.0 + 1e-5), True
    given = our_batch(case, AlgorithmConfig(group_size=SAMPLES, advantage_std="none")).advantages
    assert 0 < given.max() < 1e-5


REPORTED = {"large gaps": 3.0, "small gaps": 0.3}


@pytest.mark.parametrize("gap", REPORTED.values(), ids=REPORTED)
def test_what_is_reported_off_policy_has_its_definition(gap):
    random = np.random.default_rng(3)
    new, old, engine = (random.normal(-2, 1, 40) for _ in range(3))
    old, engine = new + 0.1 * gap * old, new + gap * engine + gap  # the engine's have a bias as well as noise
    view = TokenView(
        flat([new]), torch.ones(40), torch.arange(40) // 4, flat([engine]), flat([random.normal(0, 1, 40)]),
        old_logprobs=flat([old]),
    )  # fmt: skip
    tally = StepStatistics()
    tally.add(policy_loss(view, AlgorithmConfig()))
    told = tally.metrics(40)
    weights = np.exp(old - engine)
    assert told["actor/ppo_kl"] == pytest.approx(np.mean(old - new), rel=1e-4)
    assert told["actor/ratio_max"] == pytest.approx(np.exp(new - old).max(), rel=1e-4)
    assert told["mismatch/mean"] == pytest.approx(np.abs(old - engine).mean(), rel=1e-4)
    assert told["mismatch/max"] == pytest.approx(np.abs(old - engine).max(), rel=1e-4)
    assert told["mismatch/k3"] == pytest.approx(np.mean(weights - 1 - np.log(weights)), rel=1e-4)
    assert told["mismatch/ess"] == pytest.approx(weights.sum() ** 2 / (40 * (weights**2).sum()), rel=1e-4)


PAPERS = {
    "grpo": ("group", "sample", "clip", 0.2, 0.2, "token_mean", "loss", "low_var_kl", 0, 0.0),
    "dr_grpo": ("group", "none", "clip", 0.2, 0.2, "constant", "loss", "low_var_kl", 0, 0.0),
    "dapo": ("group", "sample", "clip", 0.2, 0.28, "token_mean", "loss", "low_var_kl", 3, 1.0),
    "gspo": ("group", "sample", "sequence_clip", 3e-4, 4e-4, "sequence_mean", "loss", "low_var_kl", 0, 0.0),
    "cispo": ("group", "sample", "clipped_weight", 1.0, 4.0, "token_mean", "loss", "low_var_kl", 0, 0.0),
    "rloo": ("leave_one_out", "sample", "clip", 0.2, 0.2, "sequence_sum", "reward", "kl", 0, 0.0),
    "reinforce++": ("batch", "sample", "clip", 0.2, 0.2, "token_mean", "reward", "kl", 0, 0.0),
    "reinforce++_baseline": ("batch_over_group", "sample", "clip", 0.2, 0.2, "token_mean", "loss", "mse", 0, 0.0),
    "ppo": ("gae", "sample", "clip", 0.2, 0.2, "token_mean", "reward", "kl", 0, 0.0),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_name_stands_for_these_settings(name):
    config = AlgorithmConfig(name=name)
    assert PAPERS[name] == (
        config.advantage, config.advantage_std, config.surrogate, config.clip_low, config.clip_high, config.aggregation,
        config.kl_in, config.kl_estimator, config.max_refills, config.overlong_penalty,
    )  # fmt: skip
    assert (config.correction, config.diff_clip, config.final_clip, config.kl_coef) == ("none", None, None, 0.0)


@pytest.mark.parametrize("name", [name for name in PRESETS if AlgorithmConfig(name=name).kl_in == "reward"])
def test_a_divergence_in_the_reward_pulls_along_its_own_gradient(name):
    """Exact, over a vocabulary of three: the policy gradient of the estimate equals the KL gradient; that of k3 does not."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, generator=random, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(3, generator=random, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    cost = divergence(logprobs.detach(), ref, AlgorithmConfig(name=name).kl_estimator)
    (taken,) = torch.autograd.grad((logprobs.exp().detach() * cost * logprobs).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits)
    assert torch.allclose(taken, exact)


def test_estimators_agree_where_the_policies_do():
    same = torch.tensor([-1.0, -3.0])
    for kind in ("kl", "abs", "mse", "low_var_kl"):
        assert divergence(same, same, kind).tolist() == [0.0, 0.0]


def test_the_coefficient_follows_the_divergence_by_at_most_a_fifth():
    controller = Controller(AlgorithmConfig(kl_coef=0.1, kl_target=0.01, kl_horizon=100), 0.1)
    controller.observe(1.0, samples=50)
    assert controller.coefficient == pytest.approx(0.1 * (1 + 0.2 * 0.5))
    controller.observe(0.0, samples=50)
    assert controller.coefficient == pytest.approx(0.1 * 1.1 * 0.9)
    short = Controller(AlgorithmConfig(kl_coef=0.1, kl_target=0.01, kl_horizon=1), 0.1)
    short.observe(0.0, samples=50)
    assert short.coefficient == pytest.approx(0.1 * 0.8), "a short horizon moves it by a fifth, not below 0"
    short.observe(1.0, samples=50)
    assert short.coefficient == pytest.approx(0.1 * 0.8 * 1.2)
    for _ in range(5000):
        short.observe(0.0, samples=50)
    assert short.coefficient > 0, "from 0 it could not rise again"
    fixed = Controller(AlgorithmConfig(kl_coef=0.1), 0.1)
    fixed.observe(1.0, samples=50)
    assert fixed.coefficient == 0.1


def test_a_group_has_signal_when_its_valid_rewards_differ():
    scores = [Score(1.0), Score(1.0), Score(None, "error")]
    assert not dapo.has_signal(scores)
    assert dapo.has_signal([*scores, Score(0.0)])


def bandit_gradient(correction):
    """Estimated and exact policy gradient of a four-armed softmax bandit, sampled by a slightly different engine."""
    random = torch.Generator().manual_seed(0)
    rewards = torch.tensor([0.0, 0.2, 0.5, 1.0])
    logits = torch.tensor([0.3, -0.2, 0.1, 0.0], requires_grad=True)
    engine = (logits.detach() + torch.tensor([0.5, 0.0, -0.4, 0.3])).log_softmax(0)
    arms = torch.multinomial(engine.exp(), 400_000, replacement=True, generator=random)
    logprobs = logits.log_softmax(0)[arms]
    config = AlgorithmConfig(correction=correction, correction_high=5.0, correction_low=0.0)
    tokens = TokenView(logprobs, torch.zeros(len(arms)), torch.arange(len(arms)), engine[arms], rewards[arms])
    (-policy_loss(tokens, config).loss.mean()).backward()
    odds = logits.detach().softmax(0)
    return logits.grad, odds * (rewards - (odds * rewards).sum())


@pytest.mark.parametrize("correction", ["token_tis", "sequence_tis", "icepop"])
def test_a_corrected_off_policy_gradient_is_the_analytic_one(correction):
    estimated, exact = bandit_gradient(correction)
    assert (estimated - exact).norm() / exact.norm() < 0.02


def test_without_a_correction_it_is_not():
    estimated, exact = bandit_gradient("none")
    assert (estimated - exact).norm() / exact.norm() > 0.1
