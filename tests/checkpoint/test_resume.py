"""A run resumed after any kind of stop equals one that was not interrupted."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from rlcore.checkpoint.folder import latest_checkpoint, newest_checkpoint, read_state
from rlcore.checkpoint.saver import Saver
from rlcore.checkpoint.state import random_states, restore_random_states
from rlcore.cli import train
from rlcore.cli.main import INTERRUPTED, main
from rlcore.cli.run_folder import Claim
from rlcore.data.prompts import PromptSource
from rlcore.distributed.snapshot import Snapshot
from rlcore.errors import ConfigError, RunError, WorkerDied
from rlcore.monitor.sinks import Sinks
from rlcore.rollout.sampler import TorchRollout
from rlcore.runtime.signals import Interruption

REWARD = "test_resume.graded"
STEPS = 5
TRAIN_CALLS, EVAL_CALLS = 2 * 4, 3  # reward calls per step, per evaluation
calls = 0


def graded(response, answer, fields, *, signal: int = 0, call: int = 0):
    """A varying score; its `call`-th call sends `signal` to its own process."""
    module = importlib.import_module("test_resume")  # whatever name this file runs under
    module.calls += 1
    if module.calls == call:
        os.kill(os.getpid(), signal)
    return len(set(response)) / 10


def reward_call(step: int) -> int:
    """Index of that step's second reward call, counting evaluations (initial, and after every second step)."""
    return EVAL_CALLS + (step - 1) * TRAIN_CALLS + ((step - 1) // 2) * EVAL_CALLS + 2


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_llama):
    """A run with warm start, reference, minibatches, evaluation, epochs of five rows, a checkpoint every two steps."""
    if "vllm" in sys.modules:
        pytest.fail("an earlier test loaded vLLM into this process, which changes rounding; call its file test_vllm_*.py")
    rows = {"name": "arithmetic", "options": {"count": 5, "max_value": 9}}
    file = tmp_path_factory.mktemp("settings") / "run.yaml"
    file.write_text(
        yaml.safe_dump({
            "model": {"path": str(tiny_llama), "precision": "fp32"},
            "backend": {"options": {"threads": 1}},
            "data": {
                "train": rows, "max_prompt_tokens": 64,
                "eval": {"name": "arithmetic", "options": {"split": "test", "count": EVAL_CALLS}},
            },
            "sft": {"steps": 2, "rows_per_step": 2, "optimizer": {"lr": 1e-3}},
            "rollout": {"engine": "torch", "max_new_tokens": 6},
            "reward": [{"name": REWARD}],
            "algorithm": {"group_size": 4, "kl_coef": 0.1},
            "optimizer": {"lr": 1e-3, "warmup_steps": 7},
            "train": {
                "steps": STEPS, "prompts_per_step": 2, "minibatches_per_step": 2, "save_every": 2,
                "max_tokens_per_microbatch": 128,
            },
            "evaluation": {"every": 2, "at_end": False, "max_new_tokens": 6, "temperature": 1.0},
        }),
        encoding="utf-8",
    )  # fmt: skip
    return ["grpo", str(file), "--run-dir"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch, backend):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    importlib.import_module("test_resume").calls = 0
    yield
    backend.prepare()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, command):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        assert main([*command, str(folder)]) == 0
    return folder


def numbers(folder):
    """metrics.jsonl without time and memory metrics."""
    clock = re.compile(r"timing/.*|memory/.*|sync/.*seconds|.*_tps|tps_throughput")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [json.dumps({name: value for name, value in row.items() if not clock.fullmatch(name)}) for row in rows]


def assert_same(folder, expected):
    assert numbers(folder) == numbers(expected)
    assert (folder / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()
    assert_same_state(folder, expected)


def assert_same_state(folder, expected, last=STEPS):
    last = Path("checkpoints") / f"step_{last:06d}"
    for name in ("model/model.safetensors", "optimizer.safetensors", "state.json"):
        assert (folder / last / name).read_bytes() == (expected / last / name).read_bytes(), name


def steps(folder):
    return [json.loads(line)["step"] for line in numbers(folder)]


def test_the_run_that_is_compared_with_says_something(uninterrupted):
    """It learns, its reference differs from its policy, and it runs more than one epoch."""
    rows = [json.loads(line) for line in numbers(uninterrupted)]
    assert steps(uninterrupted) == [0, 1, 2, 3, 4, 5]
    assert all(row["grad_norm"] > 0 for row in rows[1:])
    assert rows[3]["actor/kl_loss"] > rows[1]["actor/kl_loss"] > 0, "minibatches: the second is off the reference already"


def test_kill_9_and_resume_is_the_same_run(command, uninterrupted, tmp_path):
    """Killed while step 4 is scored: step 3 is logged but not checkpointed, so it runs again from step 2."""
    folder = tmp_path / "run"
    killed = [f"reward.0.options={{signal: {int(signal.SIGKILL)}, call: {reward_call(4)}}}"]
    program = "import sys; from rlcore.cli.main import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2]))}
    arguments = [sys.executable, "-c", program, *command, str(folder), *killed]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert steps(folder) == [0, 1, 2, 3]
    assert newest_checkpoint(folder).name == "step_000002"
    warm = (folder / "sft" / "metrics.jsonl").read_bytes()
    assert main([*command, str(folder), "--resume-anyway"]) == 0
    assert_same(folder, uninterrupted)
    assert (folder / "sft" / "metrics.jsonl").read_bytes() == warm, "the warm start is read, not made again"


VARIANTS = {
    "ppo": ["algorithm.name=ppo", "critic={optimizer: {lr: 1.0e-3}}"],
    "lora": ["model.lora={rank: 4}"],
    "adaptive": ["algorithm.kl_target=0.001", "algorithm.kl_horizon=20"],
    "dapo": ["algorithm.name=dapo", "train.epochs_per_step=2"],
    "schedule": ["optimizer.schedule=cosine", "optimizer.min_lr=1.0e-5", "train.gradient_checkpointing=true"],
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_state_is_resumed(command, tmp_path, overrides):
    """Stopped in step 4, resumed from step 2 or 3, against the same run uninterrupted."""
    stopped = [f"reward.0.options={{signal: {int(signal.SIGTERM)}, call: {reward_call(4)}}}", *overrides]
    assert main([*command, str(tmp_path / "whole"), *overrides]) == 0
    importlib.import_module("test_resume").calls = 0
    assert main([*command, str(tmp_path / "stopped"), *stopped]) == INTERRUPTED
    assert main([*command, str(tmp_path / "stopped"), "--resume-anyway", *overrides]) == 0
    assert_same(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_saves_the_last_finished_step_and_leaves(command, uninterrupted, tmp_path, number, capsys):
    """While step 4 is scored it has no state to keep: step 3 is saved."""
    folder, before = tmp_path / "run", signal.getsignal(number)
    assert main([*command, str(folder), f"reward.0.options={{signal: {int(number)}, call: {reward_call(4)}}}"]) == 130
    assert capsys.readouterr().err == "rlcore: interrupted\n"
    assert steps(folder) == [0, 1, 2, 3]
    assert newest_checkpoint(folder).name == "step_000003"
    assert signal.getsignal(number) is before
    assert main([*command, str(folder), "--resume-anyway"]) == 0
    assert_same(folder, uninterrupted)


def test_a_signal_after_the_update_lets_the_step_finish(command, uninterrupted, tmp_path, capsys):
    """During the evaluation that follows step 2: the step is evaluated, saved and written, then the run stops."""
    folder = tmp_path / "run"
    call = reward_call(3) - 2
    assert main([*command, str(folder), f"reward.0.options={{signal: {int(signal.SIGTERM)}, call: {call}}}"]) == 130
    assert "stopping after this step is saved; once more to stop at once" in capsys.readouterr().err
    assert numbers(folder) == numbers(uninterrupted)[:3]
    assert newest_checkpoint(folder).name == "step_000002"
    assert main([*command, str(folder), "--resume-anyway"]) == 0
    assert_same(folder, uninterrupted)


def test_a_run_whose_engine_failed_goes_on_from_its_checkpoint(command, uninterrupted, tmp_path, monkeypatch, capsys):
    """In step 4, once; a failed engine is not asked again. Without restarts the run ends with what it said."""
    real, streams = TorchRollout.stream, []

    def fails(self, prompts, sampling):
        streams.append(self)
        if len(streams) == 7:  # evaluations before step 1 and after step 2, four steps
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(self, prompts, sampling)

    monkeypatch.setattr(TorchRollout, "stream", fails)
    said = "the engine failed while sampling: RuntimeError('CUDA error: an illegal memory access was encountered')"
    assert main([*command, str(tmp_path / "ends")]) == 1
    assert capsys.readouterr().err.startswith(f"rlcore: {said}; --resume, or placement.max_restarts")
    streams.clear()
    importlib.import_module("test_resume").calls = 0
    assert main([*command, str(tmp_path / "run"), "placement.max_restarts=1"]) == 0
    assert f"{said}; --resume, or placement.max_restarts, goes on from" in capsys.readouterr().out
    assert len(set(map(id, streams[:7]))) == 1 and streams[7] is not streams[6]
    assert_same(tmp_path / "run", uninterrupted)
    history = [json.loads(line)["event"] for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert history == ["started", "a worker died", "resumed"]


def test_a_warm_start_is_gone_on_with_where_it_was_stopped(command, uninterrupted, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(PromptSource, "draw", at_draw(2, send))
        assert main([*command, str(folder)]) == INTERRUPTED
    assert not (folder / "metrics.jsonl").exists()
    assert newest_checkpoint(folder / "sft").name == "step_000001"
    assert main([*command, str(folder), "--resume"]) == 0
    assert numbers(folder / "sft") == numbers(uninterrupted / "sft")
    assert_same(folder, uninterrupted)


def test_resuming_a_finished_run_changes_nothing(command, uninterrupted):
    def files():
        found = (path for path in uninterrupted.rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in found if "tfevents" not in path.name and path.name != "history.jsonl"}

    before = files()
    assert main([*command, str(uninterrupted), "--resume"]) == 0
    assert files() == before


# training without sampling


def at_draw(call, act):
    """`PromptSource.draw` that calls `act` before its `call`-th call; each call uses a random number, as a data set may."""
    real, calls = PromptSource.draw, []

    def draw(self, count):
        calls.append(random.random())
        if len(calls) == call:
            act()
        return real(self, count)

    return draw


class Gone(BaseException):
    """As if the process were gone."""


def die():
    raise Gone


@pytest.fixture(params=["sft", "dpo"])
def training(request, tmp_path, tiny_llama):
    """Six steps of two rows of five, with a checkpoint every second step."""
    rows = [{"prompt": f"{n} + {n}?", "answer": "", "good": f"It is {2 * n}.", "bad": f"{n}"} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"answer": None, "target": "good", **({"rejected": "bad"} if request.param == "dpo" else {})}
    size = {"sft": "rows_per_step", "dpo": "pairs_per_step"}[request.param]
    values = {
        "model": {"path": str(tiny_llama)}, "backend": {"options": {"threads": 1}},
        "data": {"train": {"path": str(tmp_path / "rows.jsonl"), "options": columns}, "max_prompt_tokens": 64},
        request.param: {"steps": 6, size: 2, "optimizer": {"lr": 1e-3, "schedule": "linear", "warmup_steps": 2}},
        "train": {"save_every": 2, "max_tokens_per_microbatch": 512}, "logging": {"tensorboard": False},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return [request.param, str(tmp_path / "run.yaml"), "--run-dir"]


def test_supervised_and_preference_training_go_on_as_if_they_had_not_stopped(training, tmp_path, monkeypatch):
    """Interrupted in step 4: step 3 is saved. Killed in step 4: resumes from step 2."""
    whole = tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(PromptSource, "draw", at_draw(0, die))
        assert main([*training, str(whole)]) == 0
    assert {path.name for path in (whole / "checkpoints").glob("step*")} == {f"step_{n:06d}" for n in (2, 4, 6)}
    for act, saved in ((send, "step_000003"), (die, "step_000002")):
        folder = tmp_path / act.__name__
        with monkeypatch.context() as patch:
            patch.setattr(PromptSource, "draw", at_draw(4, act))
            try:
                assert main([*training, str(folder)]) == INTERRUPTED
            except Gone:
                assert act is die
        assert newest_checkpoint(folder).name == saved
        with monkeypatch.context() as patch:
            patch.setattr(PromptSource, "draw", at_draw(0, die))
            assert main([*training, str(folder), "--resume"]) == 0
        assert numbers(folder) == numbers(whole)
        assert_same_state(folder, whole, last=6)


# one process per run folder


def meddling(response, answer, fields, *, command: list[str], folder: str):
    """On its first call, tries to resume the calling run from another process."""
    module = importlib.import_module("test_resume")
    module.calls += 1
    if module.calls == 1:
        arguments = [sys.executable, "-m", "rlcore", *command, folder, "--resume"]
        module.meddled = subprocess.run(arguments, capture_output=True, text=True, check=False)
    return len(set(response)) / 10


def test_a_run_that_lives_keeps_its_folder_to_itself(command, uninterrupted, tmp_path):
    module, folder = importlib.import_module("test_resume"), tmp_path / "run"
    options = json.dumps({"command": command, "folder": str(folder)})
    meddler = ["reward.0.name=test_resume.meddling", f"reward.0.options={options}"]
    assert main([*command, str(folder), *meddler]) == 0
    assert module.meddled.returncode == 2
    assert module.meddled.stderr == (
        f"rlcore: --run-dir: {folder} is being written by pid {os.getpid()} on {socket.gethostname()}; wait for it or end it,"
        " or give another folder\n"
    )
    assert_same_state(folder, uninterrupted)


def test_death_gives_a_run_folder_back(tmp_path):
    program = (
        "import sys; from rlcore.cli.run_folder import *\n"
        "one = Claim(Path(sys.argv[1])); one.take(); print('taken'); input()"
    )
    holder = subprocess.Popen([sys.executable, "-uc", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout.readline() == b"taken\n"
        with Claim(tmp_path) as claim, pytest.raises(ConfigError, match=f"is being written by pid {holder.pid} on "):
            claim.take()
        holder.kill()
    with Claim(tmp_path) as claim:
        claim.take()
        claim.take()  # the same process may claim again, as after a worker died
        assert claim.taken


def test_a_run_that_began_while_another_was_loading_is_not_written_over(tmp_path):
    (tmp_path / "config.yaml").touch()
    with Claim(tmp_path) as claim, pytest.raises(ConfigError, match="already holds a run; give --resume to go on with it"):
        train._begin(claim, None, {}, 0.0)


def test_the_reference_is_still_the_model_that_the_run_started_from(tmp_path, tiny_llama, command, backend, capsys):
    """Whatever lies at model.path now: other weights of the same shapes are refused."""
    model, folder = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_llama, model)
    run = [*command, str(folder), f"model.path={model}", "train.steps=2", "evaluation=null"]
    assert main(run) == 0
    weights = load_file(model / "model.safetensors")
    save_file({name: weight + 1e-3 for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    assert main([*run[:-2], "train.steps=3", "evaluation=null", "--resume"]) == 2
    assert "the run started from other weights than those of model.path" in capsys.readouterr().err
    shutil.copyfile(tiny_llama / "model.safetensors", model / "model.safetensors")
    assert main([*run[:-2], "train.steps=3", "evaluation=null", "--resume"]) == 0


# checkpoints


def filling(response, answer, fields, *, call: int):
    """From its `call`-th call on, files of this process are limited to 200 KB."""
    module = importlib.import_module("test_resume")
    module.calls += 1
    if module.calls == call:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    return len(set(response)) / 10


def test_a_full_disk_names_the_checkpoint_that_is_whole_and_can_be_gone_on_from(command, uninterrupted, tmp_path, capsys):
    folder, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    full = ["reward.0.name=test_resume.filling", f"reward.0.options={{call: {reward_call(4)}}}"]
    try:
        assert main([*command, str(folder), *full]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"rlcore: {folder}/checkpoints/step_000004 cannot be written: ")
    assert said.endswith("; step_000002 is whole: free some room, then go on from it with --resume")
    assert main([*command, str(folder), "--resume-anyway"]) == 0
    assert_same_state(folder, uninterrupted)


class Rank:
    """Saves `text`; one file of it as a rank writes it."""

    ranks = 1

    def __init__(self, text, fault=None):
        self.text, self.fault = text, fault

    def save(self, folder):
        self.snapshot = Snapshot(folder)
        self.snapshot.tensors("weights", [("weight", torch.tensor([ord(letter) for letter in self.text]))])
        if self.fault:
            self.snapshot.files(self.fail)
        self.snapshot.begin()

    def fail(self, folder):
        raise OSError(self.fault)

    def unwritten(self):
        return self.snapshot.fault


def save(folder, step, text="", **options):
    """A checkpoint of one step; `options` are the saver's or the rank's."""
    fault, state = options.pop("fault", None), options.pop("state", {})
    with Saver(folder, Rank(text or f"step {step}", fault), **options) as saver:
        saver.save(f"step_{step:06d}", {"step": step, **state})
        saver.commit()


def text_of(checkpoint):
    return "".join(map(chr, load_file(checkpoint / "weights.safetensors")["weight"].tolist()))


def latest(folder, said=None):
    return latest_checkpoint(folder, (said if said is not None else []).append)


def there(folder):
    return {path.name for path in (folder / "checkpoints").iterdir()}


def test_a_save_that_fails_leaves_the_one_before(tmp_path):
    save(tmp_path, 1, "first")
    with pytest.raises(RunError, match="step_000002 cannot be written: disk full; step_000001 is whole: free some room"):
        save(tmp_path, 2, fault="disk full")
    assert latest(tmp_path).name == "step_000001" and there(tmp_path) == {"step_000001", "latest"}
    save(tmp_path, 2, "second")
    assert read_state(latest(tmp_path))["step"] == 2 and text_of(latest(tmp_path)) == "second"
    assert there(tmp_path) == {"step_000001", "step_000002", "latest"}


def test_a_death_before_latest_is_moved_resumes_from_the_one_before(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr("rlcore.checkpoint.saver.replace_file", lambda path, text: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(RunError):
            save(tmp_path, 2)
    assert latest(tmp_path).name == "step_000001"
    save(tmp_path, 2, "again")
    assert text_of(latest(tmp_path)) == "again"


def test_a_death_before_a_checkpoint_is_whole_leaves_the_one_before(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real = os.replace

    def dies(source, target):
        if Path(source).is_dir():
            raise OSError("gone")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(RunError):
            save(tmp_path, 2)
    draft = tmp_path / "checkpoints" / ".step_000002.partial"
    draft.mkdir()
    (draft / "weights.safetensors").write_text("half of")
    warnings = []
    assert latest(tmp_path, warnings).name == "step_000001" and not any(warnings)
    save(tmp_path, 3)
    assert there(tmp_path) == {"step_000001", "step_000003", "latest"}, "what will never be finished is removed"


def spoiled(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


DAMAGE = {
    "a flipped byte": (lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "was changed after it was written"),
    "half a file": (lambda data: data[: len(data) // 2], r"has \d+ bytes, \d+ were written"),
}


@pytest.mark.parametrize(("change", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, change, said):
    save(tmp_path, 1)
    save(tmp_path, 2)
    spoiled(tmp_path / "checkpoints" / "step_000002" / "weights.safetensors", change)
    warnings = []
    assert latest(tmp_path, warnings).name == "step_000001"
    assert re.search(rf"step_000002/weights.safetensors {said}.*; going on from step_000001$", warnings[0])
    spoiled(tmp_path / "checkpoints" / "step_000001" / "weights.safetensors", change)
    with pytest.raises(ConfigError, match=f"step_000002/.*{said}.*step_000001/.*{said}.*no checkpoint is whole"):
        latest(tmp_path)


def test_a_checkpoint_that_lost_a_file_is_passed_over(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "checkpoints" / "step_000002" / "weights.safetensors").unlink()
    assert latest(tmp_path).name == "step_000001"
    (tmp_path / "checkpoints" / "step_000001" / "state.json").unlink()
    with pytest.raises(ConfigError, match=r"weights\.safetensors cannot be read: .*step_000001 is not whole: .*state\.json"):
        latest(tmp_path)


def test_only_the_last_and_the_best_are_kept(tmp_path):
    for step, score in enumerate([0.1, 0.9, 0.4, None, 0.6], start=1):
        save(tmp_path, step, keep=2, best="score", state={} if score is None else {"best": score})
    assert there(tmp_path) == {"step_000002", "step_000004", "step_000005", "latest"}


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    """The tensors are those of the moment of the save, whatever becomes of them."""
    rank, go = Rank("before"), threading.Event()
    weight = torch.zeros(4)

    def held(folder):
        rank.snapshot = Snapshot(folder)
        rank.snapshot.files(lambda _: go.wait(10))
        rank.snapshot.tensors("weights", [("weight", weight)])
        rank.snapshot.begin()

    rank.save = held
    with Saver(tmp_path, rank) as saver:
        saver.save("step_000001", {"step": 1})
        saver.commit()
        weight += 1
        saver.check()
        assert not (tmp_path / "checkpoints" / "latest").exists()
        go.set()
    assert load_file(latest(tmp_path) / "weights.safetensors")["weight"].tolist() == [0, 0, 0, 0]


def test_a_checkpoint_appears_when_the_lines_of_its_step_are_written(tmp_path):
    """Otherwise a run that is killed between the two goes on without them."""
    rank = Rank("text")
    with pytest.raises(KeyboardInterrupt), Saver(tmp_path, rank) as saver:
        saver.save("step_000001", {"step": 1})
        while not list((tmp_path / "checkpoints").glob("*/.written-00000")):
            time.sleep(0.01)
        time.sleep(0.1)
        assert there(tmp_path) == {".step_000001.partial"}
        saver.commit()
        saver.wait()
        assert there(tmp_path) == {"step_000001", "latest"}
        saver.save("step_000002", {"step": 2})
        raise KeyboardInterrupt  # before it is committed: nobody waits for it
    save(tmp_path, 3)
    assert there(tmp_path) == {"step_000001", "step_000003", "latest"}


class Silent(Rank):
    """Never writes anything."""

    def save(self, folder):
        self.snapshot = Snapshot(folder)


def test_a_rank_that_died_keeps_nobody_waiting(tmp_path):
    save(tmp_path, 1)
    began = time.monotonic()
    with pytest.raises(WorkerDied, match="gone"), Saver(tmp_path, Silent("")) as saver:
        saver.save("step_000002", {"step": 2})
        saver.commit()
        raise WorkerDied("gone")
    assert time.monotonic() - began < 20
    assert latest(tmp_path).name == "step_000001"


def test_ranks_are_not_asked_when_a_run_has_failed(tmp_path, monkeypatch):
    """One may wait in a collective for the one that failed; what is being written is finished all the same."""
    monkeypatch.setattr("rlcore.checkpoint.saver._PATIENCE", 5.0)
    rank = Rank("text")
    rank.unwritten = lambda: pytest.fail("asked")
    with pytest.raises(RunError, match="not finite"), Saver(tmp_path, rank) as saver:
        saver.save("step_000001", {"step": 1})
        saver.commit()
        raise RunError("not finite")
    assert text_of(latest(tmp_path)) == "text"
    monkeypatch.setattr("rlcore.checkpoint.saver._PATIENCE", 0.1)
    with pytest.raises(RunError, match="not finite"), Saver(tmp_path, Silent("")) as saver:
        saver.save("step_000002", {"step": 2})
        saver.commit()
        raise RunError("not finite")
    assert latest(tmp_path).name == "step_000001"


def test_random_states_come_back():
    import numpy

    saved = json.loads(json.dumps(random_states()))
    first = (random.random(), numpy.random.rand(), torch.rand(1).item())
    restore_random_states(saved)
    assert (random.random(), numpy.random.rand(), torch.rand(1).item()) == first


# files of a run


def test_lines_of_unfinished_steps_are_dropped_whatever_characters_a_sample_holds(tmp_path):
    sinks = Sinks(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        sinks.write(step, {"score": 0.5}, [{"response": "one\u2028two\x85three\x0bfour"}])
    sinks.close()
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write('{"step": 4, "response": "cut off é'.encode()[:-1])
    Sinks(tmp_path, tensorboard=False, first_step=3).close()
    kept = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [line["step"] for line in kept] == [1, 2]
    assert kept[0]["response"] == "one\u2028two\x85three\x0bfour"
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 2


# signals


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_outside_a_step_a_signal_stops_at_once():
    with Interruption() as interruption, pytest.raises(KeyboardInterrupt):
        send()
    assert not interruption.abandoned


def test_afterwards_signals_find_the_handlers_of_before():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with Interruption():
        assert not {signal.getsignal(number) for number in numbers} & set(before)
    assert [signal.getsignal(number) for number in numbers] == before


def test_inside_a_step_the_first_signal_waits_and_the_second_does_not():
    with Interruption() as interruption:
        interruption.hold()
        send()
        with pytest.raises(KeyboardInterrupt):
            interruption.release()
        assert not interruption.abandoned
    with Interruption() as interruption:
        interruption.hold()
        send()
        with pytest.raises(KeyboardInterrupt):
            send()
        assert interruption.abandoned


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_nobody_could_catch_stops_before_the_next_step():
    class Ends:
        def __del__(self):
            send()  # Python prints and ignores exceptions raised here

    with Interruption() as interruption:
        Ends()
        interruption.hold()
        with pytest.raises(KeyboardInterrupt):
            interruption.release()
        assert not interruption.abandoned
