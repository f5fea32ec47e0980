"""The command line: its error for every mistake, and one complete small run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from run_files import ARITHMETIC, settings, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlcore import registry
from rlcore.cli import train
from rlcore.cli.main import main
from rlcore.errors import WorkerDied
from rlcore.monitor.console import Console


def never(response, answer, fields):
    """A reward that fails for every second text length and otherwise gives 1."""
    if len(response) % 2:
        raise RuntimeError("no verdict")
    return 1.0


@pytest.fixture(autouse=True)
def _threads(backend):
    yield
    backend.prepare()


@pytest.fixture
def start(tmp_path, tiny_llama, capsys):
    """Run a command on a run file; returns its status, stdout, stderr and run folder."""

    def run(*overrides, command="grpo", folder=tmp_path / "run", **sections):
        file = write(tmp_path, tiny_llama, **sections)
        place = ["--run-dir", str(folder)] if command in ("grpo", "sft") else []
        capsys.readouterr()
        status = main([command, str(file), *overrides, *place])
        captured = capsys.readouterr()
        return status, captured.out, captured.err, folder

    return run


@pytest.fixture
def refused(start):
    """The error message of a run that does not start and leaves nothing behind."""

    def run(*overrides, **sections):
        status, _, said, folder = start(*overrides, **sections)
        assert status == 2, said
        assert said.startswith("rlcore: ") and len(said.splitlines()) == 1
        assert not folder.exists()
        return said.removeprefix("rlcore: ").rstrip("\n")

    return run


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def of_file(path, **options):
    return {"data": {"train": {"path": path, "options": options}, "max_prompt_tokens": 64}}


GOOD = {"prompt": "What is 1 + 1?", "answer": "2"}


# settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.grop_size=8", "algorithm.grop_size: no such setting; did you mean 'group_size'?"),
        ("train.steps=ten", "train.steps: input should be a valid integer, .* it is 'ten'"),
        ("algorithm.group_size=1", "algorithm.group_size: 1 leaves nothing to compare .*; use 2 or more"),
        ("train.max_tokens_per_microbatch=67", "train.max_tokens_per_microbatch: 67 cannot hold one sample of up to 68 tokens"),
        ("reward=[]", "reward: must list at least one reward"),
        ("backend.name=tpu", "backend.name: none of the installed backends is called 'tpu'; .*"),
        ("rollout.engine=torhc", "rollout.engine: none of the installed rollout engines is called .* mean 'torch'?"),
        ("reward.0.name=maths", "reward.0.name: none of the installed rewards is called 'maths'; did you mean 'math'?"),
        ("data.train.name=arithmetics", "data.train.name: none of the installed datasets is called .* mean 'arithmetic'?"),
        ("model.family=lama", "model.family: none of the installed families is called 'lama'; did you mean 'llama'?"),
        ("backend.options.thread=1", "backend.options.thread: no such setting; did you mean 'threads'?"),
        ("data.train.options.cuont=1", "data.train.options.cuont: no such setting; did you mean 'count'?"),
        ("data.train.options.count=0", "data.train.options.count: input should be greater than 0; it is 0"),
        ("reward.0.options.strictly=true", "reward.0.options.strictly: no such setting"),
        ("rollout.options.top=1", "rollout.options.top: no such setting"),
        ("reward.0.name=no_such_module.reward", "reward.0.name: no module 'no_such_module' .*PYTHONPATH"),
        ("reward.0.name=json.dump_it", "reward.0.name: 'json' has no 'dump_it'"),
        ("reward=[{name: math}, {name: math}]", "reward.1.name: 'math' is already reward.0; list each reward once"),
    ],
)
def test_a_wrong_setting_is_named_with_the_remedy(refused, override, message):
    said = refused(override)
    assert re.match(message.replace("?", r"\?"), said), said


def test_an_engine_that_is_not_installed_names_the_file_that_installs_it(refused, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else real(name, *rest))
    assert refused("rollout.engine=vllm") == (
        "rollout.engine: vllm is not installed; pip install -r requirements/cpu.txt or set rollout.engine=torch"
    )


@pytest.mark.parametrize("key", ["rollout.temperature", "evaluation.temperature"])
def test_a_temperature_that_an_engine_would_raise_is_refused_before_it_is_loaded(refused, key):
    data = {"train": ARITHMETIC, "eval": ARITHMETIC, "max_prompt_tokens": 64}
    settings = ("rollout.engine=vllm", "evaluation={max_new_tokens: 4}", f"{key}=0.005")
    assert refused(*settings, data=data) == (
        f"{key}: 0.005 is below 0.01, at which vLLM would sample instead; raise it to that, or set rollout.engine=torch"
    )


def test_supervised_training_without_its_section_is_refused(refused):
    assert refused(command="sft").startswith("sft: must be set for supervised training")


# data


def test_a_missing_data_file_is_named(refused, tmp_path):
    assert refused(**of_file(str(tmp_path / "no.jsonl"))) == f"{tmp_path / 'no.jsonl'}: no such data file or folder"


def test_a_data_set_without_a_path_says_what_it_needs(refused):
    assert "set its path to a .jsonl" in refused(data={"train": {"name": "gsm8k"}, "max_prompt_tokens": 64})


def test_an_empty_data_set_is_named(refused, tmp_path):
    assert refused(**of_file(jsonl(tmp_path / "empty.jsonl"))) == f"{tmp_path / 'empty.jsonl'}: holds no rows"


def test_a_broken_line_is_named_by_its_number(refused, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n{broken\n", encoding="utf-8")
    assert refused(**of_file(str(path))).startswith("rows.jsonl:2: not valid JSON: ")


def test_a_missing_column_is_named_with_those_there_are(refused, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", GOOD, {"promt": "What is 1 + 2?", "answer": "3"})
    assert refused(**of_file(path)) == (
        "rows.jsonl:2: no column 'prompt' among promt, answer; did you mean 'promt'?; data.train.options.prompt names it"
    )


def test_a_missing_answer_is_named_by_its_row(refused, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", GOOD, {"prompt": "What is 1 + 2?", "answer": ""})
    assert refused(**of_file(path)) == "rows.jsonl:2: column 'answer' is empty; fill it or remove the row"


def test_a_broken_image_is_named_by_its_row(refused, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"this is no picture")
    path = jsonl(tmp_path / "rows.jsonl", {**GOOD, "image": "broken.png"})
    assert refused(**of_file(path, images="image")).startswith("rows.jsonl:1: the image cannot be opened: ")


def test_a_missing_image_is_named_by_its_row(refused, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", {**GOOD, "image": "gone.png"})
    assert refused(**of_file(path, images="image")) == f"rows.jsonl:1: no image file {tmp_path / 'gone.png'}"


def test_images_for_a_text_model_are_refused(refused, tmp_path):
    Image.new("RGB", (28, 28)).save(tmp_path / "fine.png")
    path = jsonl(tmp_path / "rows.jsonl", {**GOOD, "image": "fine.png"})
    assert "rows:1: the row has 1 images but the model reads text only; use a" in refused(**of_file(path, images="image"))


def test_no_prompt_left_after_the_limit_says_what_the_shortest_needs(refused):
    said = refused("data.max_prompt_tokens=5")
    assert said.startswith("all 16 prompts are longer than data.max_prompt_tokens 5; the shortest has")


def test_a_long_prompt_is_refused_where_dropping_is_not_wanted(refused, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", GOOD, {"prompt": "7 + " * 60, "answer": "420"})
    said = refused("data.long_prompts=refuse", **of_file(path))
    assert said.startswith("rows:2: ") and "(1 of 2 rows are too long); raise it to" in said


def test_a_row_without_a_target_is_named_before_the_warm_start(refused, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", GOOD)
    for command in ("grpo", "sft"):
        said = refused("sft.steps=1", command=command, **of_file(path))
        assert said.startswith("rows:1: no target to imitate, and no turn of the assistant; name the column (options target or")


def test_a_target_longer_than_the_token_cap_is_named_before_the_warm_start(refused, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", {**GOOD, "target": "7 " * 300})
    said = refused("sft.steps=1", command="sft", **of_file(path, target="target"))
    assert said.startswith("rows:1: prompt and target need ") and "more than train.max_tokens_per_microbatch 256; raise" in said


def test_held_out_rows_are_checked_before_training(refused, tmp_path):
    data = {"train": ARITHMETIC, "eval": {"path": str(tmp_path / "no.jsonl")}, "max_prompt_tokens": 64}
    assert refused(data=data, evaluation={}) == f"{tmp_path / 'no.jsonl'}: no such data file or folder"


# model


def test_more_tokens_than_the_model_has_positions_are_refused(refused):
    said = refused("data.max_prompt_tokens=2045", "train.max_tokens_per_microbatch=4096")
    assert said.startswith("data.max_prompt_tokens: 2045 and 4 new tokens are 2049, more than the 2048 positions of ")
    assert said.endswith("; lower it to 2044 or less, or max_new_tokens")


def test_a_model_folder_that_is_missing_lists_the_sources(refused, tmp_path):
    said = refused(f"model.path={tmp_path / 'gone'}")
    assert said.startswith(f"model.path: '{tmp_path / 'gone'}' is neither a folder nor an installed model source; sources: ")
    assert "tiny_llama" in said


def test_a_folder_that_is_no_model_says_what_it_lacks(refused, tmp_path, tiny_llama):
    folder = tmp_path / "no_model"
    folder.mkdir()
    assert refused(f"model.path={folder}") == f"model.path: {folder} has no config.json; give the folder that holds it"
    (folder / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    assert refused(f"model.path={folder}").startswith(f"model.path: {folder} has a config.json but no *.safetensors; copy")
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert refused(f"model.path={folder}").startswith(f"model.path: {folder} has no usable tokenizer or processor files")
    for file in tiny_llama.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    assert refused(f"model.path={folder}").startswith(f"model.path: {folder} does not load: ")


def test_a_family_without_an_adapter_lists_those_there_are(refused, tmp_path, tiny_llama):
    folder = tmp_path / "mamba"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mamba"}', encoding="utf-8")
    (folder / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes())
    said = refused(f"model.path={folder}")
    assert said.startswith(f"model.path: {folder} is of the family 'mamba'; supported: ") and "llama" in said


# run folders


def test_a_refused_start_does_not_block_the_second(start, tmp_path):
    folder = tmp_path / "run"
    assert start("data.max_prompt_tokens=5", folder=folder)[0] == 2
    assert start("train.steps=1", folder=folder)[0] == 0


def test_a_folder_that_holds_a_run_is_left_alone(start):
    _, _, _, folder = start("train.steps=1")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, _, said, _ = start("train.steps=2", "seed=5")
    assert status == 2
    assert said == f"rlcore: --run-dir: {folder} already holds a run; give --resume to go on with it, or another folder\n"
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_cannot_be_written_is_named(start, tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    status, _, said, folder = start(folder=tmp_path / "file" / "run")
    assert status == 2
    assert said.startswith(f"rlcore: --run-dir: {folder} cannot be written: ") and said.endswith("; give another folder\n")


def test_resuming_needs_a_run_and_a_checkpoint(start, tmp_path):
    status, _, said, folder = start("--resume")
    assert status == 2 and said == f"rlcore: --resume: {folder} holds no run (no config.yaml)\n"
    folder.mkdir()
    (folder / "config.yaml").write_text((tmp_path / "run.yaml").read_text())
    status, _, said, _ = start("--resume")
    assert status == 2
    assert said == f"rlcore: --resume: {folder} holds no checkpoint; start it without --resume in a new folder\n"


def test_resuming_without_a_folder_asks_for_it(tmp_path, tiny_llama, capsys):
    file = write(tmp_path, tiny_llama)
    assert main(["grpo", str(file), "--resume"]) == 2
    assert capsys.readouterr().err == "rlcore: --resume: say which run with --run-dir DIR\n"


# commands


def test_help_lists_the_commands_and_what_an_exit_status_means(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert all(command in text for command in ("grpo", "sft", "plan", "show", "Exit status"))


@pytest.mark.parametrize("command", ["grpo", "sft", "plan", "show"])
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    assert all(part in text for part in ("RUN.yaml", "a.b=value", "--backend NAME", "replaces backend.name"))
    assert ("--resume" in text) == (command in ("grpo", "sft"))


@pytest.mark.parametrize("arguments", [[], ["tarin", "run.yaml"], ["grpo"], ["grpo", "run.yaml", "--resum-from", "x"]])
def test_a_wrong_command_line_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("usage: rlcore")


def test_show_prints_every_setting_with_overrides_before_and_after_options(tmp_path, tiny_llama, capsys):
    file = write(tmp_path, tiny_llama)
    assert main(["show", str(file), "seed=3", "--backend", "cpu", "train.steps=7"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["seed"], shown["backend"]["name"], shown["train"]["steps"]) == (3, "cpu", 7)
    assert shown["optimizer"]["betas"] == [0.9, 0.999]


def test_plan_says_what_each_device_is_for(start):
    pools = "{train: {roles: [actor], devices: 4}, sample: {roles: [rollout], devices: 2}}"
    status, out, _, _ = start(
        "train.prompts_per_step=8", f"placement={{kind: ray, pools: {pools}}}", "algorithm.kl_coef=0", command="plan"
    )
    assert status == 0
    assert "6 = 4 for actor + 2 for rollout (ray)" in out
    assert "on each of 4 ranks" in out


def test_plan_does_the_arithmetic(start):
    status, out, _, _ = start(
        "train.prompts_per_step=4", "train.minibatches_per_step=2", "sft={steps: 3, rows_per_step: 5}", command="plan"
    )
    said = {line[:33].strip(): line[33:].strip() for line in out.splitlines()}
    assert status == 0
    assert said["warm start"] == "3 supervised steps x 5 rows = 15, 0.94 passes over the training rows"
    assert said["training rows"] == "16"
    assert said["samples a step"] == "16 = 4 prompts x 4 (algorithm.group_size)"
    assert said["optimizer steps a step"] == "2 (train.minibatches_per_step), 8 samples each"
    assert said["micro-batches an optimizer step"] == "at most 1, none above 256 tokens (train.max_tokens_per_microbatch)"
    assert said["longest sample"] == "68 tokens = 64 prompt + 4 response"
    assert said["prompts in all"] == "8 = 0.50 passes over the training rows"
    assert said["samples in all"] == "32" and said["optimizer steps in all"] == "4"


def test_plan_counts_every_pass_over_a_step(start):
    status, out, _, _ = start("train.epochs_per_step=3", "train.minibatches_per_step=2", command="plan")
    said = {line[:33].strip(): line[33:].strip() for line in out.splitlines()}
    assert status == 0 and said["optimizer steps in all"] == "12"
    assert said["optimizer steps a step"].startswith("6 = 3 passes (train.epochs_per_step) x 2 (train.minibatches_per_step)")


@pytest.mark.parametrize(("deaths", "resumed"), [(0, [False]), (1, [False, True]), (2, [False, True])])
def test_a_run_is_restarted_as_often_as_it_may_be(tmp_path, deaths, resumed):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_000001")
    runs = []

    def run(resume, since):
        runs.append(resume)
        if len(runs) <= deaths:
            raise WorkerDied("worker 1 of 2 died")

    with pytest.raises(WorkerDied) if deaths > 1 else contextlib.nullcontext():
        train._restarting(run, tmp_path, False, 1, Console(0), 0.0)
    assert runs == resumed


def test_a_run_without_a_checkpoint_is_not_restarted(tmp_path):
    def run(resume, since):
        raise WorkerDied("worker 1 of 2 died")

    with pytest.raises(WorkerDied):
        train._restarting(run, tmp_path, False, 5, Console(0), 0.0)


# one complete run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_llama):
    """Two steps with all features: warm start, reference, evaluation, minibatches, TensorBoard."""
    folder = tmp_path_factory.mktemp("whole")
    values = settings(
        tiny_llama,
        data={
            "train": ARITHMETIC, "max_prompt_tokens": 64,
            "eval": {"name": "arithmetic", "options": {"split": "test", "count": 5}},
        },
        sft={"steps": 2, "rows_per_step": 2, "optimizer": {"lr": 1e-3}},
        reward=[{"name": f"{__name__}.never"}, {"name": "math", "weight": 2}],
        algorithm={"group_size": 4, "kl_coef": 0.1, "entropy_coef": 0.01},
        evaluation={"every": 1, "samples": 2, "temperature": 1.0, "max_new_tokens": 4},
        logging={"tensorboard": True},
    )
    values["train"]["minibatches_per_step"] = 2
    (folder / "settings.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["grpo", str(folder / "settings.yaml"), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_writes_its_settings_its_surroundings_and_a_line_a_step(whole):
    assert main(["show", str(whole / "config.yaml")]) == 0
    environment = json.loads((whole / "environment.json").read_text(encoding="utf-8"))
    assert environment["packages"]["torch"] == torch.__version__
    assert [row["step"] for row in lines(whole / "metrics.jsonl")] == [0, 1, 2]
    assert [row["step"] for row in lines(whole / "sft" / "metrics.jsonl")] == [1, 2]
    assert list((whole / "tensorboard").glob("events.*"))


def test_the_time_of_the_warm_start_is_not_the_first_steps(start):
    status, _, err, folder = start("sft={steps: 30, rows_per_step: 4}", "train.steps=1")
    assert status == 0, err
    (row,) = lines(folder / "metrics.jsonl")
    assert row["timing/update"] < row["timing/all"]


def spread(values):
    values = list(values)
    return [sum(values) / len(values), max(values), min(values)]


def test_the_numbers_of_a_step_are_those_of_its_samples(whole):
    for row in lines(whole / "metrics.jsonl")[1:]:
        here = [sample for sample in lines(whole / "samples.jsonl") if sample["step"] == row["step"]]
        samples = [sample for sample in here if sample["phase"] == "train"]
        scored = [sample for sample in samples if sample["status"] == "value"]
        groups = [samples[first : first + 4] for first in (0, 4)]

        def told(name, row=row):
            return [row[f"{name}/{kind}"] for kind in ("mean", "max", "min")]

        assert told("grpo/score") == told("grpo/rewards") == pytest.approx(spread(sample["score"] for sample in scored))
        assert told("grpo/advantages") == pytest.approx(spread(sample["advantage"] for sample in samples))
        assert told("response_length") == pytest.approx(spread(sample["response_tokens"] for sample in samples))
        assert told("prompt_length") == pytest.approx(spread(group[0]["prompt_tokens"] for group in groups))
        assert row["response_length/clip_ratio"] == sum(sample["finish"] == "length" for sample in samples) / 8
        equal = [len({sample["score"] for sample in group} - {None}) < 2 for group in groups]
        assert row["grpo/groups_without_signal"] == sum(equal) / 2
        assert row["reward/math"] == pytest.approx(sum(sample["parts"]["math"] for sample in scored) / len(scored))
        assert row["reward/error"] == 8 - len(scored) and row["reward/timeout"] == 0
        held_out = [sample["score"] for sample in here if sample["phase"] == "eval"]
        rows = [[score for score in held_out[first : first + 2] if score is not None] for first in range(0, 10, 2)]
        assert row["eval/score"] == pytest.approx(spread(sum(one) / len(one) for one in rows if one)[0])
        assert row["eval/error"] == sum(score is None for score in held_out)
        tokens = sum(sample["prompt_tokens"] + sample["response_tokens"] for sample in samples)
        for name, stage in (("e2e", "all"), ("update", "update"), ("vllm", "rollout")):
            assert row[f"{name}_tps"] == pytest.approx(tokens / row[f"timing/{stage}"])
        assert row["decode_tps"] == pytest.approx(sum(sample["response_tokens"] for sample in samples) / row["timing/rollout"])


def test_the_times_of_a_step_fit_in_it(whole):
    """A single process overlaps nothing."""
    for row in lines(whole / "metrics.jsonl")[1:]:
        stages = [f"timing/{name}" for name in ("resharding_to_infer", "data", "rollout", "reward", "adv", "reference_model")]
        parts = [row[name] for name in [*stages, "timing/old_log_p", "timing/update", "timing/other"]]
        assert min(parts) >= 0 and min(row["timing/evaluate"], row["timing/update"], row["timing/rollout"]) > 0
        assert sum(parts) == pytest.approx(row["timing/all"], abs=0.01)
        assert ("timing/save_checkpoint" in row) == (row["step"] == 2)
        for stage in ("reward", "adv", "reference_model"):
            assert row[f"timing/non_overlap_{stage}"] == pytest.approx(row[f"timing/{stage}"], abs=0.01)


def test_the_update_says_what_it_saw(whole):
    for row in lines(whole / "metrics.jsonl")[1:]:
        assert row["grpo/lr"] == 1e-6 and row["grad_norm"] > 0
        assert 0 <= row["actor/pg_clipfrac"] <= 1 and row["actor/ratio_max"] >= 1
        assert 0 < row["actor/entropy"] <= math.log(1024)
        assert 0 <= row["actor/kl_loss"] < 1e-4, "at this rate the policy hardly leaves its reference"
        assert 0 <= row["mismatch/k3"] <= row["mismatch/mean"] <= row["mismatch/max"] < 0.2, "in bf16; below 1e-3 in fp32"
        assert row["sync/bytes"] > 0 and row["sync/seconds"] >= row["sync/check_seconds"] > 0


def test_every_held_out_row_is_scored_once_an_evaluation(whole):
    samples = [sample for sample in lines(whole / "samples.jsonl") if sample["phase"] == "eval"]
    counts = Counter((sample["step"], sample["row"], sample["sample"]) for sample in samples)
    assert set(counts.values()) == {1}
    assert len(counts) == 3 * 5 * 2, "three evaluations of five rows, two samples each"
    assert [row["eval/rows"] for row in lines(whole / "metrics.jsonl")] == [5, 5, 5]


def test_a_reward_that_raises_is_counted_and_never_a_zero(whole):
    for row in lines(whole / "metrics.jsonl")[1:]:
        samples = [s for s in lines(whole / "samples.jsonl") if s["step"] == row["step"] and s["phase"] == "train"]
        failed = [sample for sample in samples if len(sample["response"]) % 2]
        assert len(samples) == 8 and row["reward/error"] == len(failed)
        for sample in failed:
            assert sample["score"] is None and sample["status"] == "error" and sample["advantage"] == 0
            assert sample["not_trained"] == "reward error" and "RuntimeError: no verdict" in sample["detail"]
        values = [sample["score"] for sample in samples if sample["status"] == "value"]
        assert all(value >= 1 for value in values)
        assert row.get("grpo/score/mean") == (pytest.approx(sum(values) / len(values)) if values else None)


def test_at_least_one_reward_of_the_run_did_raise(whole):
    assert sum(row["reward/error"] for row in lines(whole / "metrics.jsonl")[1:]) > 0


def test_the_saved_model_loads_with_transformers_alone(whole):
    assert (whole / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_000002"
    folder = whole / "checkpoints" / "step_000002" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 1?"}], tokenize=False, add_generation_prompt=True)
    assert torch.isfinite(model(**tokenizer(text, return_tensors="pt")).logits).all()


def test_training_moved_the_weights_away_from_the_warm_start(whole):
    first = AutoModelForCausalLM.from_pretrained(whole / "sft" / "checkpoints" / "step_000002" / "model").state_dict()
    last = AutoModelForCausalLM.from_pretrained(whole / "checkpoints" / "step_000002" / "model").state_dict()
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_the_run_is_introduced_and_closed_with_where_to_look(start):
    status, out, err, folder = start("train.steps=1")
    assert status == 0 and err == ""
    chosen, out = out.split("\n", 1)
    assert chosen.startswith("backend: cpu (auto: ")
    assert out.startswith(f"run folder: {folder}\nprecision: fp32, as model.precision says\nstep 1/1  score ")
    assert "checkpoints/        step_000001/model loads with from_pretrained" in out


def test_a_precision_that_the_processor_emulates_is_said(start, monkeypatch):
    monkeypatch.setattr(registry.load("backends", "cpu"), "default_precision", lambda self: "fp32")
    _, out, _, _ = start("train.steps=1", "model.precision=bf16")
    assert len(re.findall("warning: model.precision bf16: this cpu has no bf16 instructions", out)) == 1


def test_no_steps_at_all_is_a_run_that_ends_well(start):
    status, out, _, folder = start("train.steps=0")
    assert status == 0 and f"run folder: {folder}" in out
    assert not (folder / "checkpoints").exists()


def test_supervised_training_is_a_run_of_its_own(start):
    status, _, err, folder = start("sft.steps=2", "sft.rows_per_step=2", command="sft")
    assert status == 0, err
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [1, 2]
    assert (folder / "checkpoints" / "step_000002" / "model" / "config.json").is_file()


def test_pictures_reach_the_end_of_a_step(start, models):
    folder = models / "cli_vl"
    registry.load("models", "tiny_qwen2_5_vl")(folder, hidden_size=64, layers=2, vision_layers=2)
    data = {"train": {"name": "geometry_figures", "options": {"count": 8, "kinds": ["count"]}}, "max_prompt_tokens": 64}
    model = {"path": str(folder), "precision": "fp32"}
    status, _, err, run = start("train.steps=1", model=model, data=data, reward=[{"name": "tagged_answer"}])
    assert status == 0, err
    assert len(lines(run / "samples.jsonl")) == 8


def test_a_broken_picture_found_on_the_way_names_its_row(start, tmp_path, models):
    """Its header is valid, its pixels are not: detected when the row is drawn."""
    folder = models / "cli_vl_broken"
    registry.load("models", "tiny_qwen2_5_vl")(folder, hidden_size=64, layers=2, vision_layers=2)
    picture = tmp_path / "whole.png"
    Image.effect_noise((56, 56), 50).save(picture)
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:-600])
    path = jsonl(tmp_path / "rows.jsonl", {**GOOD, "image": "cut.png"})
    status, _, said, _ = start(model={"path": str(folder), "precision": "fp32"}, **of_file(path, images="image"))
    assert status == 2 and said.startswith("rlcore: rows.jsonl:1: the image cannot be decoded: ")


def test_the_run_of_this_file_is_where_it_was_put(whole):
    assert isinstance(whole, Path) and {path.name for path in whole.iterdir()} == {
        "config.yaml", "environment.json", "history.jsonl", "run.lock", "metrics.jsonl", "samples.jsonl", "eval.json",
        "tensorboard", "checkpoints", "sft",
    }  # fmt: skip
