"""What may change when a run is resumed, and what the user is told of the rest."""

from __future__ import annotations

import json

import pytest
import yaml
from run_files import settings

from rlcore.cli.main import main
from rlcore.config.changes import changes, free, refuse
from rlcore.config.schema import RunConfig
from rlcore.errors import ConfigError


def differing(**sections):
    values = settings("model")
    return changes(RunConfig.model_validate(values), RunConfig.model_validate({**values, **sections}))


def test_the_same_settings_do_not_differ():
    assert differing() == {}


@pytest.mark.parametrize("name", [
    "train.steps", "train.save_every", "train.max_tokens_per_microbatch", "placement.kind", "placement.pools.train.devices",
    "sharding.replicas", "backend.options.threads", "logging.tensorboard", "evaluation.every", "data.eval.0.path",
])  # fmt: skip
def test_length_place_and_measurements_are_free(name):
    assert free(name)


@pytest.mark.parametrize("name", [
    "seed", "model.path", "model.precision", "data.train.0.path", "algorithm.group_size", "optimizer.lr",
    "train.prompts_per_step", "train.minibatches_per_step", "reward..0.name", "rollout.temperature", "rollout.engine",
    "placement.max_staleness",
])  # fmt: skip
def test_what_changes_samples_or_updates_is_not(name):
    assert not free(name)


def test_a_change_of_meaning_is_named_with_both_values_and_can_be_wanted():
    found = differing(seed=7, placement={"kind": "ray"})
    assert found["seed"] == (0, 7)
    with pytest.raises(ConfigError, match=r"another run: seed was 0 and is 7; undo the change, or give --resume-anyway"):
        refuse(found, anyway=False)
    refuse(found, anyway=True)
    refuse(differing(placement={"kind": "ray"}), anyway=False)


def test_another_kind_of_model_cannot_be_wanted():
    model = {**settings("model")["model"], "lora": {"rank": 4}}
    with pytest.raises(ConfigError, match=r"checkpoints are of another model: model\.lora\.rank was None and is 4"):
        refuse(differing(model=model), anyway=True)


def test_the_record_and_the_history_say_what_the_run_is(tmp_path, tiny_llama, backend, capsys):
    values = {**settings(tiny_llama), "logging": {"tensorboard": False, "samples_on_console": 0}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    run = ["grpo", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run")]
    assert main([*run, "train.steps=1"]) == 0
    assert main([*run, "train.steps=2", "optimizer.lr=0.5", "--resume"]) == 2
    assert "optimizer.lr was" in capsys.readouterr().err
    assert main([*run, "train.steps=2", "--resume"]) == 0
    assert main([*run, "train.steps=3", "optimizer.lr=0.5", "--resume-anyway"]) == 0
    backend.prepare()
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (recorded["train"]["steps"], recorded["optimizer"]["lr"]) == (3, 0.5)
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started", "resumed", "resumed"]
    assert all(0 < line["loading_seconds"] < 300 for line in lines)
    assert lines[1]["changed"] == {"train.steps": [1, 2]}
    assert lines[2]["changed"].keys() == {"train.steps", "optimizer.lr"}
