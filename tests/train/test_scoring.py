"""Groups of a step before the update: their order, rewards and resampling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from run_files import first_prompts, settings

from rlcore.config.schema import RunConfig
from rlcore.config.sections import EvaluationConfig
from rlcore.model.resolved import ResolvedModel
from rlcore.monitor.clock import Clock
from rlcore.rewards.runner import RewardFunctions
from rlcore.runtime import placement
from rlcore.runtime.roles import InlineReward
from rlcore.runtime.watchdog import Watchdog
from rlcore.train import advantages, records, sampling
from rlcore.train.results import Evaluation, SetResult
from rlcore.types import Batch, Group, Prompt, Row, Sample, Score

FAILED = Score(None, "error")


def config_of(model, **sections):
    return RunConfig.model_validate(settings(model, **sections))


def group(name, *lengths):
    samples = [Sample([9] * length, [-1.0] * length, "x", "stop", 0) for length in lengths]
    return Group(Prompt(Row(name, [], answer="1"), [1, 2], [1, 2]), samples)


def test_groups_are_scored_as_they_come_and_kept_in_order():
    begun = []

    class Reward(InlineReward):
        def begin(self, group):
            begun.append(group.prompt.row.id)
            return super().begin(group)

    reward = Reward(RewardFunctions(config_of(Path("model")).reward), Clock())
    scored = sampling.scored_in_order(iter([(2, group("c", 1)), (0, group("a", 1, 1)), (1, group("b", 1))]), reward)
    assert begun == ["c", "a", "b"]
    assert [each.prompt.row.id for each in scored.groups] == ["a", "b", "c"]
    assert [len(scores) for scores in scored.scores] == [2, 1, 1]


def test_a_prompt_that_is_drawn_again_in_a_step_is_sampled_anew(tiny_llama, backend):
    """A random model gets every sample wrong: every group is replaced, here by one of the same prompt."""
    config = config_of(tiny_llama, algorithm={"group_size": 4, "max_refills": 1})
    resolved = ResolvedModel(config, backend)
    run = placement.local(resolved, Watchdog(0, Path()))
    run.load("grpo")
    run.start_engines()
    run.sync_weights()
    (prompt,) = first_prompts(resolved, 1)
    reward = InlineReward(RewardFunctions(config.reward), Clock())
    kept, replaced = sampling.collect(run, reward, lambda count: [prompt] * count, config, 1)
    drawn = [[sample.token_ids.tolist() for each in scored.groups for sample in each.samples] for scored in (kept, replaced)]
    assert len(drawn[0]) == len(drawn[1]) == 8 and drawn[0] != drawn[1]


def test_a_failed_sample_is_not_charged_for_its_length():
    config = config_of(Path("model"), algorithm={"group_size": 3, "overlong_penalty": 1.0})
    batch = Batch.of([group("a", 4, 4, 1)])  # response limit: 4 tokens
    inputs = advantages.advantage_inputs(batch, [[Score(1.0), FAILED, Score(1.0)]], config)
    assert inputs.rewards.tolist() == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)
    assert inputs.valid.tolist() == [True, False, True]


def test_an_evaluation_is_the_mean_of_rows_and_counts_failures_apart():
    groups = [group("a", 2, 4), group("b", 3, 3), group("c", 1, 1)]
    scores = [[Score(1.0), FAILED], [Score(0.0), Score(1.0)], [FAILED, Score(None, "timeout")]]
    row = Evaluation([SetResult("eval", EvaluationConfig(), groups, scores, dropped_long=2)]).metrics()
    assert row["eval/score"] == pytest.approx((1.0 + 0.5) / 2) and row["eval/error"] == 3
    assert row["eval/rows"] == 3 and row["eval/response_length"] == pytest.approx(14 / 6)
    assert row["eval/dropped_long"] == 2


@pytest.mark.parametrize("masked", [True, False])
def test_what_was_cut_off_leaves_the_loss_where_that_is_asked_for(masked):
    config = config_of(Path("model"), algorithm={"group_size": 3, "mask_truncated": masked})
    one = group("a", 2, 1, 3)
    one = replace(one, samples=[replace(one.samples[0], finish="length"), *one.samples[1:]])
    batch = Batch.of([one])
    inputs = advantages.advantage_inputs(batch, [[Score(1.0), Score(0.0), FAILED]], config)
    counted = advantages.with_advantages(batch, inputs, config.algorithm).loss_mask
    assert counted.tolist() == [not masked] * 2 + [True] + [False] * 3


def test_timeouts_and_errors_are_counted_apart():
    row = records.score_metrics([[Score(1.0), FAILED], [Score(None, "timeout"), Score(None, "timeout")]])
    assert (row["reward/error"], row["reward/timeout"]) == (1, 2)
