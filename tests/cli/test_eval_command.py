"""`rlcore eval` and `rlcore launch --train eval`: which weights are meant, and the error for each mistake."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from rlcore_backends.launch.launcher import RayLauncher
from run_files import settings

from rlcore.cli.evaluate import model_folder
from rlcore.cli.main import main
from rlcore.config import loader
from rlcore.errors import ConfigError

NOBODY = 65534


@pytest.fixture
def run_file(tmp_path, tiny_llama):
    data = {"eval": {"name": "arithmetic", "options": {"split": "test", "count": 3}}, "max_prompt_tokens": 64}
    lora = {"path": str(tiny_llama), "precision": "fp32", "lora": {"rank": 4, "sync": "adapter"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings(tiny_llama, data=data, model=lora)))
    return tmp_path / "mine.yaml"


@pytest.fixture
def saved(tmp_path, tiny_llama):
    """A run folder with two checkpoints."""
    for step in (2, 4):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:06d}"
        shutil.copytree(tiny_llama, folder / "model")
        (folder / "state.json").write_text(json.dumps({"step": step}))
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_000004")
    return tmp_path / "run"


def test_a_model_a_checkpoint_and_a_run_name_a_model_folder(saved, tiny_llama, monkeypatch):
    checkpoint = saved / "checkpoints" / "step_000002"
    assert model_folder(tiny_llama) == tiny_llama
    assert model_folder(checkpoint) == model_folder(checkpoint / "model") == checkpoint / "model"
    assert model_folder(saved) == saved / "checkpoints" / "step_000004" / "model"
    monkeypatch.chdir(saved.parent)
    assert model_folder(Path("run")) == saved / "checkpoints" / "step_000004" / "model"


def test_the_weights_that_are_meant_replace_those_of_the_run_file(run_file, saved, tmp_path):
    """The record of the run says which."""
    out = tmp_path / "out"
    assert main(["eval", str(run_file), "evaluation.max_new_tokens=4", "--model", str(saved), "--run-dir", str(out)]) == 0
    config = loader.load(out / "config.yaml")
    assert config.model.path == str(saved / "checkpoints" / "step_000004" / "model") and config.model.lora is None
    assert json.loads((out / "eval.json").read_text())["step"] == 4


def test_an_evaluation_has_a_folder_of_its_own(run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(run_file)]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mine-eval-2") and (folder / "eval.json").is_file()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda run: shutil.rmtree(run), "{run}: no such folder"),
        (lambda run: (shutil.rmtree(run), run.touch()), "{run} is a file; give the folder of a model, a checkpoint or a run"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "the run in {run} has not saved a checkpoint yet"),
        (lambda run: shutil.rmtree(run / "checkpoints" / "step_000004"), "{run}/checkpoints/latest names step_000004"),
        (
            lambda run: (shutil.rmtree(run / "checkpoints"), (run / "config.yaml").unlink()),
            "{run} is neither a model folder (config.json), nor a checkpoint (model/), nor the folder of a run",
        ),
    ],
)
def test_what_holds_no_model_is_told_apart(run_file, saved, tmp_path, capsys, broken, message):
    broken(saved)
    assert main(["eval", str(run_file), "--model", str(saved), "--run-dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"rlcore: --model: {message.format(run=saved)}") and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_model_without_weights_is_refused(run_file, saved, tmp_path, capsys):
    folder = saved / "checkpoints" / "step_000004" / "model"
    (folder / "model.safetensors").unlink()
    assert main(["eval", str(run_file), "--model", str(saved), "--run-dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"rlcore: model.path: {folder} has a config.json but no *.safetensors; copy")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's rights")
@pytest.mark.parametrize(
    ("closed", "named"),
    [(".", "."), ("checkpoints", "checkpoints/latest"), ("checkpoints/step_000004/model",) * 2,
     ("checkpoints/step_000004/model/model.safetensors",) * 2],
)  # fmt: skip
def test_what_may_not_be_read_is_named(saved, closed, named):
    for parent in saved.parents[:4]:
        parent.chmod(0o755)
    (saved / closed).chmod(0)
    os.seteuid(NOBODY)
    try:
        with pytest.raises(ConfigError, match=rf"^--model: {saved / named}\S* cannot be read \(Permission denied\); allow"):
            model_folder(saved)
    finally:
        os.seteuid(0)
        (saved / closed).chmod(0o755)


# over several nodes


@pytest.fixture
def launched(run_file, monkeypatch):
    """The command that the head of `rlcore launch` runs."""
    commands = []
    monkeypatch.setattr(RayLauncher, "run", lambda self, trainer, backend: commands.append(list(trainer)) or 0)

    def launch(*arguments):
        status = main(["launch", str(run_file), *arguments, "--nnodes", "1", "--devices-per-node", "2"])
        return status, commands[-1] if commands else None

    return launch


def test_the_launcher_evaluates_on_all_devices(launched, run_file, saved):
    status, command = launched("--train", "eval", "--model", str(saved), "--run-dir", "out")
    assert status == 0 and command[:4] == [sys.executable, "-m", "rlcore", "eval"]
    assert command[4:] == [
        str(run_file), "placement.kind=ray", "placement.devices=2", "--run-dir", "out", "--model", str(saved),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "x"], "--model: is what rlcore eval scores; grpo reads model.path"),
        (["--train", "eval", "--resume", "--run-dir", "out"], "--resume: an evaluation is not resumed; start it again"),
    ],
)
def test_the_launcher_refuses_what_its_trainer_does_not_have(launched, capsys, arguments, message):
    assert launched(*arguments) == (2, None)
    assert capsys.readouterr().err == f"rlcore: {message}\n"
