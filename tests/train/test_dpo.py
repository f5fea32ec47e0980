"""Preference pairs: the papers' losses, and a run that learns the given preferences."""

from __future__ import annotations

import json
import math
import re
import time

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from rlcore.algorithms import dpo
from rlcore.checkpoint.saver import Saver
from rlcore.cli.main import main
from rlcore.config.sections import DpoConfig
from rlcore.types import TokenView


def view(logprobs, ref, sequence):
    logprobs = torch.tensor(logprobs, requires_grad=True)
    ref = torch.tensor(ref)
    return logprobs, TokenView(logprobs, torch.zeros(len(ref)), torch.tensor(sequence), ref, ref_logprobs=ref)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, math.log(1 + math.exp(-0.1 * 0.7))),
        ({"label_smoothing": 0.2}, 0.8 * math.log(1 + math.exp(-0.07)) + 0.2 * math.log(1 + math.exp(0.07))),
        ({"loss": "hinge"}, 1 - 0.07),
        ({"loss": "ipo"}, ((0.5 / 2 - (-0.2)) - 1 / 0.2) ** 2),
    ],
)
def test_a_pair_has_the_papers_loss(settings, expected):
    """The chosen response is two tokens, 0.5 above the reference in total; the rejected one token, 0.2 below."""
    logprobs, tokens = view([-1.0, -2.0, -3.0], [-1.3, -2.2, -2.8], [0, 0, 1])
    result = dpo.loss(tokens, DpoConfig(steps=1, beta=0.1, **settings))
    assert result.loss.tolist() == pytest.approx([expected, 0.0, 0.0], rel=1e-5)
    result.loss.sum().backward()
    assert logprobs.grad[0] < 0 < logprobs.grad[2]
    assert result.means["dpo/accuracy"].tolist() == [1.0, 0.0, 0.0]


def test_several_pairs_do_not_mix():
    _, tokens = view([-1.0, -2.0, -1.0, -1.5], [-1.0, -1.0, -2.0, -1.5], [0, 1, 2, 3])
    result = dpo.loss(tokens, DpoConfig(steps=1, beta=1.0))
    single = math.log(1 + math.exp(-1))
    assert result.loss.tolist() == pytest.approx([single, 0, single, 0])


@pytest.fixture
def start(tmp_path, tiny_llama, capsys):
    def run(rows, *overrides, columns=("good", "bad")):
        data = tmp_path / "pairs.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        target, rejected = columns
        settings = {
            "model": {"path": str(tiny_llama), "precision": "fp32"}, "backend": {"options": {"threads": 1}},
            "data": {"train": {"path": str(data), "options": {"answer": None, "target": target, "rejected": rejected}}},
            "rollout": {"max_new_tokens": 16}, "train": {"max_tokens_per_microbatch": 1100}, "logging": {"tensorboard": False},
            "dpo": {"steps": 12, "pairs_per_step": 4, "optimizer": {"lr": 3e-3}},
        }  # fmt: skip
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(settings))
        status = main(["dpo", str(file), *overrides, "--run-dir", str(tmp_path / "run")])
        return status, capsys.readouterr().err, tmp_path / "run"

    return run


PAIRS = [{"prompt": f"{a} + {a}?", "good": f"It is {2 * a}.", "bad": f"{2 * a + 1}"} for a in range(8)]


@pytest.mark.parametrize("overrides", [[], ["model.lora={rank: 4}"], ["train.max_tokens_per_microbatch=1041"]])
def test_a_run_learns_the_preference_and_stays_near_the_reference_otherwise(start, overrides):
    status, said, folder = start(PAIRS, *overrides)
    assert status == 0, said
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[0]["dpo/margin"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["dpo/loss"] < 0.4
    assert rows[-1]["dpo/accuracy"] == 1.0
    AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "step_000012" / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bad": "It is 0."}, "pairs:1: the preferred and the rejected response are the same; remove the row"),
        ({"bad": ""}, "pairs.jsonl:1: column 'bad' is empty"),
        ({"bad": "no " * 1200}, "pairs:1: prompt and both responses need .* tokens in one forward pass, more than .* 1100"),
    ],
)
def test_a_pair_that_cannot_be_used_is_named(start, change, message):
    status, said, folder = start([{**PAIRS[0], **change}, *PAIRS[1:]])
    assert status == 2
    assert re.search(message, said), said
    assert not folder.exists()


def test_rows_without_pairs_say_which_columns_to_name(start):
    status, said, _ = start(PAIRS, columns=("good", None))
    assert status == 2
    assert "no rejected response; name the columns in data.train.options (target, rejected)" in said


def test_a_checkpoint_is_no_part_of_a_steps_time(start, monkeypatch):
    real = Saver.save
    monkeypatch.setattr(Saver, "save", lambda *arguments: (time.sleep(5), real(*arguments)))
    status, _, run = start(PAIRS, "dpo.steps=1")
    (step,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert status == 0 and step["timing/save_checkpoint"] > 5 > step["timing/all"]
