"""Metrics equal the given durations and lengths."""

import json
import time
from dataclasses import replace

import pytest

from rlcore.algorithms import dapo
from rlcore.errors import RunError
from rlcore.monitor.clock import Clock, Span, timings
from rlcore.monitor.metrics import lengths, throughput
from rlcore.monitor.sinks import Sinks
from rlcore.train.records import score_metrics
from rlcore.types import Group, Prompt, Row, Sample, Score


def group(prompt: int, responses: list[int]) -> Group:
    ids = list(range(prompt))
    return Group(Prompt(Row("r", []), ids, ids), [Sample([1] * n, [0.0] * n, "", "stop", 0) for n in responses])


def test_stages_report_what_was_injected():
    spans = [Span("resharding_to_infer", 0, 1), Span("rollout", 1, 4), Span("reward", 4, 4.5), Span("update", 5, 9)]
    result = timings(spans, 0, 10)
    assert result == pytest.approx({
        "timing/all": 10, "timing/resharding_to_infer": 1, "timing/rollout": 3, "timing/reward": 0.5, "timing/update": 4,
        "timing/non_overlap_reward": 0.5, "timing/other": 1.5,
    })  # fmt: skip


def test_a_stage_takes_as_long_as_its_slowest_worker():
    result = timings([Span("update", 0, 2, 0), Span("update", 1, 5, 1), Span("update", 5, 6, 1)], 0, 6)
    assert result["timing/update"] == 5
    assert result["timing/other"] == 0


def test_the_hidden_part_of_a_stage_does_not_count_as_non_overlapped():
    result = timings([Span("rollout", 0, 4), Span("reward", 3, 6)], 0, 6)
    assert result["timing/reward"] == 3
    assert result["timing/non_overlap_reward"] == 2


def test_evaluation_and_saving_are_outside_the_iteration():
    result = timings([Span("update", 0, 2), Span("evaluate", 2, 7), Span("save_checkpoint", 7, 8)], 0, 8)
    assert result["timing/all"] == 2
    assert result["timing/evaluate"] == 5
    assert result["timing/other"] == 0


def test_sampling_ahead_is_not_lost_beside_a_save():
    spans = [Span("update", 0, 1, 1), Span("rollout", 0.5, 2.5, 2), Span("save_checkpoint", 1, 6)]
    result = timings(spans, 0, 6)
    assert (result["timing/rollout"], result["timing/save_checkpoint"], result["timing/all"]) == (2, 5, 1)
    assert result["timing/other"] == 0


def test_sampling_for_the_next_step_covers_time_and_counts_in_no_stage_of_this_one():
    own = [Span("rollout", -3, -1, 2), Span("reward", -1, 0), Span("update", 0, 4, 1), Span("adv", 4, 5)]
    ahead = [Span("rollout", 1, 4.5, 2), Span("reward", 4.5, 7)]
    result = timings(own, 0, 8, beside=ahead)
    assert result == pytest.approx({
        "timing/all": 8, "timing/rollout": 2, "timing/reward": 1, "timing/update": 4, "timing/adv": 1,
        "timing/non_overlap_adv": 0, "timing/non_overlap_reward": 0, "timing/other": 1,
    })  # fmt: skip


def test_all_is_at_least_the_sum_of_the_stages_of_one_process():
    spans = [Span(stage, i, i + 1) for i, stage in enumerate(["resharding_to_infer", "rollout", "reference_model", "update"])]
    result = timings(spans, 0, 5)
    assert result["timing/all"] >= sum(result[f"timing/{span.stage}"] for span in spans)


def test_rates_are_tokens_over_seconds_and_devices():
    groups = [group(10, [5, 15]), group(20, [10, 10])]
    rates = throughput(groups, {"timing/all": 10, "timing/update": 4, "timing/rollout": 5}, devices=2)
    assert rates == pytest.approx({
        "e2e_tps": 100 / 2 / 10, "update_tps": 100 / 2 / 4, "vllm_tps": 100 / 2 / 5, "decode_tps": 40 / 2 / 5,
        "tps_throughput": 100 / 10,
    })  # fmt: skip


def test_failed_rewards_are_counted_and_left_out_of_the_mean():
    scores = [[Score(1.0), Score(None, "error")], [Score(0.0), Score(None, "timeout")]]
    result = score_metrics(scores)
    assert (result["grpo/score/mean"], result["reward/error"], result["reward/timeout"]) == (0.5, 1, 1)


def test_a_group_has_signal_by_one_definition():
    """A failed reward is not a score: without it, these samples all scored the same."""
    same, apart = [Score(1.0), Score(1.0), Score(None, "error")], [Score(1.0), Score(0.5), Score(None, "error")]
    failed, single = [Score(None, "timeout"), Score(None, "error")], [Score(1.0), Score(None, "error")]
    groups = [same, apart, failed, single]
    assert [dapo.has_signal(group) for group in groups] == [False, True, False, False]
    assert score_metrics(groups)["grpo/groups_without_signal"] == 0.75


def test_lengths_are_of_prompts_over_prompts_and_of_responses_over_samples():
    long = replace(group(30, [8]), samples=[Sample([1] * 8, [0.0] * 8, "", "length", 0)])
    told = lengths([group(10, [2, 4, 6]), long])
    assert told == {
        "prompt_length/mean": 20, "prompt_length/max": 30, "prompt_length/min": 10, "response_length/mean": 5,
        "response_length/max": 8, "response_length/min": 2, "response_length/clip_ratio": 0.25,
    }  # fmt: skip


def test_a_full_disk_names_the_folder_and_the_step(tmp_path):
    sinks = Sinks(tmp_path, tensorboard=False)
    sinks.samples.close()
    sinks.samples = open("/dev/full", "a", encoding="utf-8")
    with pytest.raises(RunError, match=rf"^{tmp_path}: step 3 cannot be written: .*No space left .*; free some room, then"):
        sinks.write(3, {"a": 1.0}, [{"response": "x"}])
    with pytest.raises(RunError, match=r"the last lines cannot be written: .*No space left"):
        sinks.close()
    assert sinks.metrics.closed and sinks.samples.closed


def test_rows_of_an_interrupted_run_are_dropped_on_resume(tmp_path):
    sinks = Sinks(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        sinks.write(step, {"a": float(step)}, [{"response": "x"}])
    sinks.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "a"')
    Sinks(tmp_path, tensorboard=False, first_step=3).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2


def test_tensorboard_reads_back_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = Sinks(tmp_path, tensorboard=True)
    sinks.write(1, {"grpo/score/mean": 0.25})
    sinks.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("grpo/score/mean")[0].value == 0.25


def test_what_a_device_still_does_belongs_to_the_span():
    clock = Clock(finish=lambda: time.sleep(0.05))
    with clock.span("update"):
        pass
    [span] = clock.take()
    assert span.end - span.start >= 0.05
