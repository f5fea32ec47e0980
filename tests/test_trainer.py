"""What a step does with its samples: which are replaced, which are left out, what a long one costs, and when it stops."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from rlcore import cli, policy

STEPS = 3


def even(response, answer, fields):
    """The same for every sample of a prompt whose answer is odd: such a group has no signal."""
    return float(len(response)) if int(answer) % 2 == 0 else 1.0


def flat(response, answer, fields):
    return 1.0


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
        status = cli.main(["grpo", str(file), *overrides, "--run-dir", str(folder)])
        written = [(folder / f"{name}.jsonl").read_text().splitlines() for name in ("metrics", "samples")]
        metrics, samples = ([json.loads(line) for line in lines] for lines in written)
        return status, metrics, samples, folder, capsys.readouterr().err

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
    real = policy.Forward.forward
    calls = []

    def poisoned(self, packed):
        logprobs, entropy = real(self, packed)
        calls.append(1)
        return (logprobs * torch.tensor(math.nan), entropy) if len(calls) > 2 else (logprobs, entropy)

    monkeypatch.setattr(policy.Forward, "forward", poisoned)
    status, metrics, _, folder, said = start()
    assert status == 1
    assert len(metrics) == len(calls) - 1 < STEPS
    (report,) = folder.glob("nonfinite_step_*.json")
    assert f"the run stops before that optimizer step, the numbers are in {report}" in said
    written = json.loads(report.read_text())
    assert written["step"] == len(calls)
    assert {"prompt", "sample", "token", "rollout_logprobs", "advantages", "loss"} <= set(written["tokens"][0])


def test_every_correction_and_divergence_reports_what_it_did(start):
    _, metrics, _, _, _ = start("algorithm.correction=geometric", "algorithm.kl_coef=0.1", "algorithm.kl_target=0.01")
    assert all(0.99 < row["mismatch/ess"] <= 1.0001 for row in metrics)
    assert metrics[0]["grpo/kl_coef"] == 0.1 != metrics[-1]["grpo/kl_coef"]


def test_divergence_in_the_reward_lowers_it(start):
    _, metrics, _, _, _ = start("algorithm.name=rloo", "algorithm.kl_coef=5.0", "optimizer.lr=0.01")
    assert metrics[0]["actor/kl_penalty"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["actor/kl_penalty"] > 0
    for row in metrics:
        cost = 5 * row["actor/kl_penalty"] * row["response_length/mean"]
        assert row["grpo/rewards/mean"] == pytest.approx(row["grpo/score/mean"] - cost, rel=1e-4, abs=1e-4)


def test_a_critic_comes_to_expect_what_is_earned(start):
    status, metrics, _, folder, _ = start(
        "algorithm.name=ppo", "critic={optimizer: {lr: 1.0e-2}}", "reward.0.name=test_trainer.flat", "train.steps=12",
        "train.epochs_per_step=2",
    )
    assert status == 0
    assert metrics[0]["critic/values"] == pytest.approx(0, abs=0.3)
    assert metrics[-1]["critic/values"] == pytest.approx(1, abs=0.2)
    assert metrics[-1]["critic/loss"] < metrics[0]["critic/loss"] / 5
    assert (folder / "checkpoints" / "step_000012" / "critic" / "critic.safetensors").exists()
