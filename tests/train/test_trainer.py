"""A step's samples: replaced groups, masked samples, overlong penalty, and early stopping."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlcore import registry
from rlcore.cli.main import main
from rlcore.config.sections import DatasetConfig
from rlcore.data.rows import load_rows
from rlcore.model.forward import Forward

STEPS = 3
calls = 0  # of a reward that counts its calls


def even(response, answer, fields):
    """Equal rewards for all samples of a prompt with an odd answer: such a group has no signal."""
    return float(len(response)) if int(answer) % 2 == 0 else 1.0


def flat(response, answer, fields):
    return 1.0


def nine_tenths(response, answer, fields):
    return 0.9


def of_prompt(response, answer, fields):
    return float(int(answer) % 2)


def never(response, answer, fields):
    raise RuntimeError("no verdict")


def until(response, answer, fields, *, call: int = 0):
    """Fails from its `call`-th call on."""
    module = importlib.import_module("test_trainer")  # whatever name this file runs under
    module.calls += 1
    if module.calls > call:
        raise RuntimeError("no more")
    return float(len(response))


def thirds(response, answer, fields):
    module = importlib.import_module("test_trainer")
    module.calls += 1
    return (0.0, 0.5, 1.0)[module.calls % 3]


@pytest.fixture
def start(tmp_path, tiny_llama, capsys, monkeypatch, backend):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    settings = {
        "model": {"path": str(tiny_llama), "precision": "fp32"}, "backend": {"options": {"threads": 1}},
        "data": {"train": {"name": "arithmetic", "options": {"count": 64, "max_value": 9}}, "max_prompt_tokens": 64},
        "rollout": {"engine": "torch", "max_new_tokens": 6}, "reward": [{"name": "test_trainer.even"}],
        "algorithm": {"group_size": 4}, "train": {"steps": STEPS, "prompts_per_step": 4, "max_tokens_per_microbatch": 256},
        "logging": {"tensorboard": False},
    }  # fmt: skip

    def run(*overrides):
        file, folder = tmp_path / "run.yaml", tmp_path / "run"
        file.write_text(yaml.safe_dump(settings))
        status = main(["grpo", str(file), *overrides, "--run-dir", str(folder)])
        written = [(folder / f"{name}.jsonl").read_text().splitlines() for name in ("metrics", "samples")]
        metrics, samples = ([json.loads(line) for line in lines] for lines in written)
        run.out, err = capsys.readouterr()
        return status, metrics, samples, folder, err

    yield run
    backend.prepare()


def test_groups_without_signal_are_replaced_within_the_bound(start):
    status, metrics, samples, _, _ = start("algorithm.max_refills=8")
    assert status == 0
    for row in metrics:
        here = [sample for sample in samples if sample["step"] == row["step"]]
        replaced = [sample for sample in here if "another prompt took its place" in (sample["not_trained"] or "")]
        trained = [sample for sample in here if sample not in replaced]
        assert len(trained) == 16, "the step has as many groups as without"
        assert row["data/replaced_groups"] == len(replaced) / 4 > 0
        assert all(int(sample["answer"]) % 2 for sample in replaced)
        assert row["grpo/groups_without_signal"] == pytest.approx(len(replaced) / len(here))


def test_a_step_without_any_signal_keeps_its_last_groups_and_goes_on(start):
    status, metrics, samples, _, _ = start("algorithm.max_refills=2", "reward.0.name=test_trainer.flat")
    assert status == 0
    assert [row["data/replaced_groups"] for row in metrics] == [8.0] * STEPS
    assert [row["grad_norm"] for row in metrics] == [0.0] * STEPS
    assert len(samples) == STEPS * 3 * 16


def test_samples_that_were_cut_off_are_left_out(start):
    settings = ("algorithm.mask_truncated=true", "rollout.max_new_tokens=12", "algorithm.group_size=16")
    status, _, samples, _, _ = start(*settings)
    assert status == 0
    reasons = {(sample["finish"], sample["not_trained"]) for sample in samples}
    cut = "cut off at rollout.max_new_tokens"
    assert {finish for finish, _ in reasons} == {"stop", "length"}
    assert {reason == cut for finish, reason in reasons if finish == "length"} == {True}
    assert {reason == cut for finish, reason in reasons if finish == "stop"} == {False}


def test_a_long_response_is_punished_in_the_reward_and_not_in_the_score(start):
    status, metrics, samples, _, _ = start("algorithm.overlong_penalty=2", "reward.0.name=test_trainer.flat")
    assert status == 0
    longest = [max(s["response_tokens"] for s in samples if s["step"] == row["step"]) for row in metrics]
    assert longest == [6] * STEPS
    for row in metrics:
        assert row["grpo/score/min"] == 1.0
        assert row["grpo/rewards/min"] == pytest.approx(-1.0)


def test_a_loss_that_is_no_number_stops_the_run_and_writes_its_samples(start, monkeypatch):
    real = Forward.forward
    calls = []

    def poisoned(self, packed):
        logprobs, entropy = real(self, packed)
        calls.append(1)
        return (logprobs * torch.tensor(math.nan), entropy) if len(calls) > 2 else (logprobs, entropy)

    monkeypatch.setattr(Forward, "forward", poisoned)
    status, metrics, _, folder, said = start()
    assert status == 1
    assert len(metrics) == len(calls) - 1 < STEPS
    (report,) = folder.glob("nonfinite_step_*.json")
    assert f"the run stops before that optimizer step, the numbers are in {report}" in said
    written = json.loads(report.read_text())
    assert written["step"] == len(calls)
    assert {"prompt", "sample", "token", "rollout_logprobs", "advantages", "loss"} <= set(written["tokens"][0])


def test_an_engine_with_the_actors_weights_agrees_with_it(start):
    _, metrics, _, _, _ = start("algorithm.correction=geometric", "model.precision=fp32")
    for row in metrics:
        assert row["mismatch/mean"] < row["mismatch/max"] < 1e-3
        assert row["mismatch/ess"] == pytest.approx(1, abs=1e-5)


def test_the_coefficient_of_a_step_follows_the_divergence_of_the_one_before(start):
    """With a horizon shorter than a step the coefficient changes by at most a fifth."""
    settings = ("algorithm.kl_coef=0.1", "algorithm.kl_target=0.5", "algorithm.kl_horizon=3", "train.steps=4")
    for place, name in (("loss", "actor/kl_loss"), ("reward", "actor/kl_penalty")):
        status, metrics, _, folder, _ = start(*settings, f"algorithm.kl_in={place}", "algorithm.group_size=5")
        assert status == 0
        assert metrics[0]["grpo/kl_coef"] == 0.1
        for before, after in pairwise(metrics):
            error = max(-0.2, min(0.2, before[name] / 0.5 - 1))
            assert after["grpo/kl_coef"] == pytest.approx(before["grpo/kl_coef"] * (1 + error))
        shutil.rmtree(folder)


def test_the_rate_that_is_told_is_the_last_optimizer_steps(start):
    _, metrics, _, folder, _ = start(
        "optimizer={lr: 1.0e-3, schedule: linear, warmup_steps: 2}", "train.minibatches_per_step=2", "train.steps=3"
    )
    assert [row["grpo/lr"] for row in metrics] == pytest.approx([1e-3, 1e-3 * 2 / 3, 0])
    assert json.loads((folder / "checkpoints/step_000003/optimizer.json").read_text()) == {"steps": 6}


def test_a_step_with_fewer_groups_takes_as_many_optimizer_steps(start):
    """Groups left without signal after refills are dropped, and the schedule still ends with the run."""
    status, metrics, samples, folder, _ = start(
        "train.minibatches_per_step=4", "algorithm.max_refills=1", "optimizer={lr: 1.0e-3, schedule: linear}",
        "algorithm.group_size=2", "train.steps=4",
    )
    assert status == 0
    trained = [sum(s["step"] == row["step"] and s["advantage"] is not None for s in samples) // 2 for row in metrics]
    assert min(trained) < 4, "this run has a short step"
    assert json.loads((folder / "checkpoints/step_000004/optimizer.json").read_text()) == {"steps": 16}
    assert metrics[-1]["grpo/lr"] == 0


def test_divergence_in_the_reward_lowers_it(start):
    _, metrics, _, _, _ = start("algorithm.name=rloo", "algorithm.kl_coef=5.0", "optimizer.lr=0.01")
    assert metrics[0]["actor/kl_penalty"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["actor/kl_penalty"] > 0
    for row in metrics:
        cost = 5 * row["actor/kl_penalty"] * row["response_length/mean"]
        assert row["grpo/rewards/mean"] == pytest.approx(row["grpo/score/mean"] - cost, rel=1e-4, abs=1e-4)


def test_a_critic_comes_to_expect_of_each_prompt_what_it_earns(start):
    """A constant could not: half the prompts earn 1 and half 0, so the best constant has a loss of 1/8."""
    status, metrics, samples, folder, _ = start(
        "algorithm.name=ppo", "critic={optimizer: {lr: 3.0e-3}}", "reward.0.name=test_trainer.of_prompt", "train.steps=15",
        "train.epochs_per_step=3", "data.train.options.count=4", "data.train.options.seed=1",
    )  # fmt: skip
    assert status == 0
    assert {sample["score"] for sample in samples} == {0.0, 1.0}
    assert metrics[0]["critic/values"] == pytest.approx(0, abs=0.3)
    assert metrics[-1]["critic/loss"] < 0.03
    assert (folder / "checkpoints" / "step_000015" / "critic" / "critic.safetensors").exists()


# sampling


def test_a_prompt_draws_other_samples_each_step_and_each_refill(start):
    """One row and fixed weights: only the seed differs."""
    still = ("data.train.options.count=1", "train.prompts_per_step=1", "optimizer.lr=1e-30", "rollout.max_new_tokens=16")
    _, _, samples, _, _ = start(*still, "algorithm.max_refills=2", "reward.0.name=test_trainer.flat")
    drawn = [tuple(sample["response"] for sample in samples[first : first + 4]) for first in range(0, len(samples), 4)]
    assert len(drawn) == STEPS * 3 == len(set(drawn))


def test_an_evaluation_samples_as_it_is_told_and_not_as_training_does(start, tiny_llama):
    """Greedy, with its own length limit: equals transformers' generate."""
    rows = "{name: arithmetic, options: {count: 3, max_value: 9}}"
    _, metrics, samples, _, _ = start(
        f"data.eval={rows}", "evaluation={max_new_tokens: 9, at_end: false}", "train.steps=1", "rollout.temperature=5",
        "model.precision=fp32",
    )  # fmt: skip
    told = [sample for sample in samples if sample["phase"] == "eval"]
    assert len(told) == metrics[0]["eval/rows"] == 3
    family = registry.load("families", "llama")(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for row, sample in zip(load_rows(DatasetConfig(**yaml.safe_load(rows))), told, strict=True):
        prompt = torch.tensor([list(family.encode(row).token_ids)])
        ids = model.generate(prompt, do_sample=False, max_new_tokens=9, eos_token_id=sorted(family.stop_token_ids))
        assert sample["response"] == family.decode(ids[0, prompt.shape[1] :].tolist())
    assert max(sample["response_tokens"] for sample in told) == 9 > 6


def test_a_second_pass_over_a_steps_samples_is_off_policy(start):
    _, once, _, folder, _ = start("optimizer.lr=0.01")
    shutil.rmtree(folder)
    _, twice, _, _, _ = start("optimizer.lr=0.01", "train.epochs_per_step=2")
    assert all(row["actor/ratio_max"] == 1 for row in once)
    assert all(row["actor/ratio_max"] > 1.001 for row in twice)


# messages


def test_a_run_whose_every_reward_fails_is_an_error_that_names_the_first(start, backend):
    status, metrics, _, folder, said = start("reward.0.name=test_trainer.never")
    assert status == 1
    assert re.fullmatch(
        r"rlcore: step 1: the reward of each of its 16 samples failed; the first: reward 'test_trainer.never', row \S+:"
        r" RuntimeError: no verdict; mend the reward or the rows, then go on with --resume or start again\n", said,
    ), said  # fmt: skip
    assert metrics == [] and not (folder / "checkpoints").exists()


def test_a_reward_that_fails_for_good_loses_no_step(start):
    """Step 3 has no score: step 2 is saved."""
    importlib.import_module("test_trainer").calls = 0
    status, metrics, _, folder, said = start("reward.0.name=test_trainer.until", "reward.0.options={call: 32}")
    assert status == 1 and said.startswith("rlcore: step 3: the reward of each of its 16 samples failed; ")
    assert [row["step"] for row in metrics] == [1, 2]
    assert (folder / "checkpoints" / "latest").read_text() == "step_000002"


def test_failed_rewards_are_said_each_step_with_the_first_reason(start):
    importlib.import_module("test_trainer").calls = 0
    settings = ("reward.0.name=test_trainer.until", "reward.0.options={call: 10}", "train.steps=1")
    status, metrics, samples, _, _ = start(*settings)
    assert status == 0 and metrics[0]["reward/error"] == 6
    assert {sample["not_trained"] for sample in samples if sample["score"] is None} == {"reward error"}
    said = r"warning: 6 of 16 rewards failed \(6 error\); the first: reward 'test_trainer.until', row .*no more"
    assert re.search(said, start.out)


def test_the_reason_why_a_sample_taught_nothing_is_true(start):
    """Scores 0, 0.5 and 1: the middle one equals the group mean, and the group has signal."""
    importlib.import_module("test_trainer").calls = 0
    _, metrics, samples, _, _ = start("reward.0.name=test_trainer.thirds", "algorithm.group_size=3", "train.steps=1")
    reasons = {sample["score"]: sample["not_trained"] for sample in samples}
    assert reasons == {0.0: None, 0.5: "no advantage: its reward is the mean of those it is compared with", 1.0: None}
    assert metrics[0]["grpo/groups_without_signal"] == 0


def test_rows_that_are_too_long_are_said_and_counted(start, tmp_path):
    for name, lengths in (("train", (1, 1, 200)), ("held_out", (1, 200, 200, 1, 1))):
        lines = [json.dumps({"prompt": "7 + " * n, "answer": "2"}) for n in lengths]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    train, held_out = (f"{{path: {tmp_path / name}.jsonl}}" for name in ("train", "held_out"))
    data = f"{{train: {train}, eval: {held_out}, max_prompt_tokens: 64}}"
    _, metrics, _, folder, _ = start(f"data={data}", "evaluation={max_new_tokens: 2, every: 1}", "train.steps=1")
    for row in metrics:
        assert (row["eval/rows"], row["eval/dropped_long"]) == (3, 2)
    assert metrics[1]["data/dropped_long"] == 1
    told = "rows are left out: their prompts are longer than data.max_prompt_tokens 64"
    assert f"warning: data.train: 1 of 3 {told}" in start.out and f"warning: data.eval: 2 of 5 {told}" in start.out
    shutil.rmtree(folder)
    start(f"data={data}", "train.steps=1")
    assert "warning: data.eval: no row of it is evaluated, because evaluation is not set; add it" in start.out


def test_equal_rewards_move_no_weight(start, tiny_llama):
    reasons = {
        "grpo": "every sample of the group scored the same",
        "reinforce++": "its reward is the mean of those it is compared with",
    }
    for name, reason in reasons.items():
        settings = ("reward.0.name=test_trainer.nine_tenths", "optimizer.lr=0.1", f"algorithm.name={name}")
        _, metrics, samples, folder, _ = start(*settings)
        assert [row["grad_norm"] for row in metrics] == [0.0] * STEPS
        assert {sample["not_trained"] for sample in samples} == {f"no advantage: {reason}"}
        trained, first = folder / "checkpoints" / f"step_{STEPS:06d}" / "model", load_file(tiny_llama / "model.safetensors")
        assert all(torch.equal(weight, first[key]) for key, weight in load_file(trained / "model.safetensors").items())
        shutil.rmtree(folder)
