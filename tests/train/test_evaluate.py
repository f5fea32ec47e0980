"""Evaluation: what each number is, every row once on any number of devices, settings by set, and both ways without training."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import combinations, islice
from statistics import fmean

import pytest
import torch
import yaml
from metrics_page import undocumented
from run_files import settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlcore import registry
from rlcore.cli.main import main
from rlcore.config.loader import validate
from rlcore.config.placement import ROLES
from rlcore.config.schema import RunConfig
from rlcore.config.sections import EvaluationConfig
from rlcore.data.sources import held_out_prompts
from rlcore.errors import ConfigError, RunError
from rlcore.model.resolved import ResolvedModel
from rlcore.monitor.clock import Clock
from rlcore.monitor.console import evaluation_table
from rlcore.monitor.sinks import Sinks
from rlcore.rewards.runner import RewardFunctions
from rlcore.runtime.placement import Placement
from rlcore.runtime.pool import Here, Pool
from rlcore.runtime.roles import InlineReward
from rlcore.runtime.worker import Worker
from rlcore.train import evaluate
from rlcore.train.records import evaluation_records
from rlcore.train.results import Columns, Evaluation, SetResult, column_value, pass_at
from rlcore.types import Group, Prompt, Row, Sample, Score

TWICE = {"samples": 2, "temperature": 1.0}
SEEDS = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "samples": 4}
FAILED = Score(None, "error", detail="no verdict")


def graded(response, answer, fields):
    """A score that a random model spreads over many values; it fails now and then."""
    if len(response) % 5 == 0:
        raise RuntimeError("no verdict")
    return len(set(response)) / 10


@pytest.fixture(autouse=True)
def _threads(backend):
    yield
    backend.prepare()


def rows(count, **more):
    return {"name": "arithmetic", "options": {"split": "test", "count": count, "max_value": 9}, **more}


def of(model, held_out, /, **sections):
    """Settings of a run that evaluates these sets."""
    data = {"eval": held_out, "max_prompt_tokens": 64}
    defaults = {"data": data, "reward": [{"name": f"{__name__}.graded"}], "evaluation": {"max_new_tokens": 6}}
    return settings(model, **(defaults | sections))


def start(folder, values, *arguments, command="eval", name="run"):
    """The exit status of the command on these settings, and its run folder."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return main([command, str(file), *arguments, "--run-dir", str(folder / name)]), folder / name


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def samples_of(folder, **wanted):
    samples = lines(folder / "samples.jsonl")
    return [sample for sample in samples if all(sample.get(name) == value for name, value in wanted.items())]


def group(name, scores, lengths=None, source="", **fields):
    lengths = lengths or [1] * len(scores)
    samples = [Sample([9] * length, [-1.0] * length, "x", "length" if length > 4 else "stop", 0) for length in lengths]
    return Group(Prompt(Row(name, [], fields=fields, source=source), [1, 2], [1, 2]), samples)


def result(*groups_and_scores, name="eval", dropped=0, **settings):
    groups, scores = zip(*groups_and_scores, strict=True)
    valued = [[score if isinstance(score, Score) else Score(score) for score in each] for each in scores]
    return SetResult(name, EvaluationConfig(**settings), groups, valued, dropped)


def rated(scores, lengths=None, source="", **fields):
    return group("row", scores, lengths, source, **fields), scores


# definitions


@pytest.mark.parametrize("passed", range(7))
def test_pass_at_k_is_the_share_of_k_samples_that_hold_one_that_passes(passed):
    outcomes = [place < passed for place in range(6)]
    for k in range(1, 7):
        assert pass_at(k, 6, passed) == pytest.approx(fmean(any(chosen) for chosen in combinations(outcomes, k)))


def test_the_numbers_of_a_set_are_those_of_their_definitions():
    """Against a second calculation, sample by sample, on random scores of which some failed."""
    source = random.Random(3)
    scores = [[source.choice([0.0, 0.4, 0.9, 1.0, None]) for _ in range(4)] for _ in range(25)] + [[None] * 4]
    lengths = [[source.randint(1, 6) for _ in range(4)] for _ in scores]
    given = [
        (group(f"{place}", each, length), [FAILED if one is None else one for one in each])
        for place, (each, length) in enumerate(zip(scores, lengths, strict=True))
    ]
    told = result(*given, dropped=3, samples=4, temperature=1.0, passing_score=0.9).metrics()
    valued = [[one for one in each if one is not None] for each in scores]
    valued = [each for each in valued if each]
    assert told["score"] == pytest.approx(sum(sum(each) / len(each) for each in valued) / len(valued))
    assert told["accuracy"] == pytest.approx(sum(sum(s >= 0.9 for s in each) / len(each) for each in valued) / len(valued))
    whole = [sum(one >= 0.9 for one in each) for each in valued if len(each) == 4]
    assert 5 < len(whole) < len(valued) < 26, "some rows have failed samples, and one has nothing else"
    assert told["avg@4"] == told["pass@1"] == pytest.approx(sum(whole) / 4 / len(whole))
    assert told["pass@2"] == pytest.approx(fmean(1 - (4 - c) * (3 - c) / 12 for c in whole))
    assert told["pass@4"] == pytest.approx(fmean(c > 0 for c in whole))
    assert {name for name in told if "@" in name} == {"avg@4", "pass@1", "pass@2", "pass@4"}
    assert (told["rows"], told["unscored"], told["dropped_long"]) == (26, 26 - len(valued), 3)
    assert told["error"] == sum(one is None for each in scores for one in each)
    assert told["response_length"] == pytest.approx(fmean(one for each in lengths for one in each))
    assert told["clip_ratio"] == pytest.approx(fmean(one > 4 for each in lengths for one in each))


def test_a_number_of_samples_that_is_no_power_of_2_is_the_last_k():
    told = result(rated([1.0] + [0.0] * 5), samples=6, temperature=1.0).metrics()
    assert [name for name in told if name.startswith("pass@")] == ["pass@1", "pass@2", "pass@4", "pass@6"]
    assert told["pass@6"] == 1.0


def test_a_set_whose_every_reward_failed_has_no_score():
    told = result(rated([FAILED, FAILED]), samples=2, temperature=1.0).metrics()
    assert (told["rows"], told["unscored"], told["error"]) == (1, 1, 2)
    assert not {"score", "accuracy", "avg@2", "pass@1"} & told.keys()


def test_a_sum_of_weighted_rewards_that_is_1_to_rounding_passes():
    assert result(rated([0.1 * 3 + 0.7 - 1e-12])).metrics()["accuracy"] == 1.0


def test_rows_are_summed_up_by_source_and_level():
    one = result(
        rated([1.0], source="gsm8k", level=1), rated([0.0], source="gsm8k", level=2.0), rated([1.0], source="math", level=2),
        rated([FAILED], source="math", level=None), rated([0.0], source="math"),
    )  # fmt: skip
    parts = one.parts()
    assert {column: {name: part["rows"] for name, part in found.items()} for column, found in parts.items()} == {
        "source": {"gsm8k": 2, "math": 3}, "level": {"1": 1, "2": 2},
    }  # fmt: skip
    assert parts["source"]["math"]["accuracy"] == 0.5 and parts["source"]["math"]["error"] == 1
    assert parts["level"]["2"]["score"] == 0.5
    assert Evaluation([one]).metrics()["eval/level/2/accuracy"] == 0.5
    assert result(rated([1.0], source="gsm8k")).parts() == {}, "a single source is no part"


@pytest.mark.parametrize(
    ("value", "text"),
    [("Level 5", "Level 5"), (3, "3"), (3.0, "3"), (0.5, "0.5"), (1234567, "1234567"), (True, "True"), ("", None), (None, None),
     (float("nan"), None), ([1], None)],
)  # fmt: skip
def test_a_value_that_tells_rows_apart_is_a_text_or_a_number(value, text):
    assert column_value(Row("a", [], fields={"kind": value}), "kind") == text


def test_named_sets_are_told_apart_and_together():
    """Over all rows, not over sets; the loss over all tokens."""
    easy = result(rated([1.0]), rated([1.0]), rated([0.5]), name="easy", dropped=1, passing_score=0.5)
    hard = result(rated([0.5]), name="hard", dropped=2)
    losses = {
        name: {"loss": loss, "loss_tokens": tokens, "loss_rows": 1.0, "dropped_long": 0.0}
        for name, loss, tokens in (("easy", 1.0, 30.0), ("hard", 3.0, 10.0))
    }
    told = Evaluation([easy, hard], losses).metrics()
    assert (told["eval/easy/accuracy"], told["eval/hard/accuracy"], told["eval/accuracy"]) == (1.0, 0.0, 0.75)
    assert (told["eval/score"], told["eval/rows"], told["eval/dropped_long"]) == (0.75, 4, 3)
    assert told["eval/loss"] == 1.5 and told["eval/hard/loss"] == 3.0 and told["eval/loss_rows"] == 2
    alone = Evaluation([replace(hard, name="eval")]).metrics()
    assert alone["eval/score"] == 0.5 and not any(name.startswith("eval/eval") for name in alone)


def test_the_table_has_a_line_for_each_set_and_each_value_of_its_columns():
    easy = result(rated([1.0, 0.0], level="a"), rated([1.0, 1.0], level="b"), name="easy", dropped=7, **TWICE)
    hard = result(rated([FAILED]), name="hard")
    said = [line.split() for line in evaluation_table(Evaluation([easy, hard]).report(3)).splitlines()]
    assert " ".join(said[0]) == "held-out rows rows score accuracy avg@2 pass@1 pass@2 tokens cut off failed dropped"
    assert said[1] == "easy 2 0.7500 0.7500 0.7500 0.7500 1.0000 1 0.0000 0 7".split()
    assert said[2][:4] == ["level", "a", "1", "0.5000"] and said[3][:4] == ["level", "b", "1", "1.0000"]
    assert said[4] == "hard 1 1 0.0000 1 0".split()
    assert said[5][:4] == ["all", "3", "0.7500", "0.7500"]


def test_a_column_that_no_row_has_is_refused_unless_rows_may_lack_it():
    columns = Columns(["source", "level", "kidn"])
    columns.see(Row("a", [], fields={"kind": "x"}))
    with pytest.raises(ConfigError, match=r"^evaluation.by: no held-out row has a text or number in a column 'kidn'; did you"):
        columns.refuse_missing()
    columns.see(Row("b", [], fields={"kidn": 3}))
    columns.refuse_missing()


# each row once, wherever it is sampled


class Set:
    """A model and sets to evaluate in this process, on any number of workers."""

    def __init__(self, values):
        self.config = validate(RunConfig, values)
        kind = registry.load("backends", "cpu")
        self.resolved = ResolvedModel(self.config, kind(kind.Options(threads=1)))
        self.held_out = held_out_prompts(self.config.data, self.resolved.family)
        self.workers = []

    def evaluated(self, devices=1):
        """Content of eval.json, and the samples."""
        while len(self.workers) < devices:
            self.workers.append(Worker(self.resolved))
            self.workers[-1].start_engine()
        run = Placement(self.config, dict.fromkeys(ROLES, Pool([Here(worker) for worker in self.workers[:devices]])))
        run.load_encoder()
        reward = InlineReward(RewardFunctions(self.config.reward), Clock())
        evaluation = Evaluation(evaluate.evaluate(run, reward, self.held_out, self.config))
        return evaluation.report(0), list(evaluation_records(evaluation))


def in_fours(prompts, limit):
    prompts = iter(prompts)
    while portion := list(islice(prompts, 4)):
        yield portion


def test_any_number_of_devices_and_of_portions_gives_the_same_evaluation(tiny_llama, monkeypatch):
    ours = Set(of(tiny_llama, {"seeds": rows(13, **SEEDS), "greedy": rows(7)}))
    report, samples = ours.evaluated()
    assert report["all"]["rows"] == 20 and 0 < report["all"]["error"] < 30
    drawn = [(sample["set"], sample["row"], sample["sample"]) for sample in samples]
    ids = [("seeds", f"arithmetic-test:{row}", sample) for row in range(13) for sample in range(4)]
    assert drawn == [*ids, *(("greedy", f"arithmetic-test:{row}", 0) for row in range(7))]
    assert len({sample["response"] for sample in samples[:52]}) > 45
    for devices in (2, 3):
        assert ours.evaluated(devices) == (report, samples)
    monkeypatch.setattr(evaluate, "portions", in_fours)
    assert ours.evaluated(3) == (report, samples)


def test_another_seed_of_the_run_is_another_evaluation(tiny_llama):
    values = of(tiny_llama, rows(5, **SEEDS))
    first, second = (Set({**values, "seed": seed}).evaluated()[1] for seed in (0, 1))
    assert [one["row"] for one in first] == [one["row"] for one in second]
    assert [one["response"] for one in first] != [one["response"] for one in second]


def test_a_portion_holds_as_many_images_as_fit():
    visions = {str(n): {"pixel_values": torch.zeros(n)} if n else None for n in (3, 0, 2, 9, 1, 4, 5)}
    prompts = [Prompt(Row(name, []), [1], [1], vision) for name, vision in visions.items()]
    found = [[prompt.row.id for prompt in portion] for portion in evaluate.portions(prompts, limit=5 * 4)]
    assert found == [["3", "0", "2"], ["9"], ["1", "4"], ["5"]]
    assert [len(portion) for portion in evaluate.portions(prompts, limit=1000)] == [7]
    assert list(evaluate.portions([], limit=5)) == []


# settings


def test_the_settings_of_a_set_hold_for_it_alone(tiny_llama):
    """Among one token, any temperature is greedy; the hot set differs, and only one set is longer."""
    sets = {
        "greedy": rows(5), "one": rows(5, temperature=5.0, top_k=1), "nucleus": rows(5, temperature=5.0, top_p=1e-6),
        "hot": rows(5, temperature=5.0), "long": rows(5, max_new_tokens=20),
    }  # fmt: skip
    ours = Set(of(tiny_llama, {}, data={"eval": sets, "max_prompt_tokens": 34}))
    assert min(len(prompt.token_ids) for prompt in ours.held_out["long"]) > 34 + 6 - 20, "an engine needs room for the longest"
    report, samples = ours.evaluated()
    said = {name: [sample["response"] for sample in samples if sample["set"] == name] for name in sets}
    assert said["one"] == said["nucleus"] == said["greedy"] != said["hot"]
    longest = {name: max(sample["response_tokens"] for sample in samples if sample["set"] == name) for name in sets}
    assert longest == {"greedy": 6, "one": 6, "nucleus": 6, "hot": 6, "long": 20}
    assert report["sets"]["one"]["settings"] == {
        "max_new_tokens": 6, "temperature": 5.0, "top_p": 1.0, "top_k": 1, "samples": 1, "passing_score": 1.0,
    }  # fmt: skip


def test_a_set_may_have_a_passing_score_of_its_own(tiny_llama):
    sets = {"low": rows(5, passing_score=0.0), "high": rows(5, passing_score=9.0)}
    report, _ = Set(of(tiny_llama, sets)).evaluated()
    assert report["sets"]["low"]["accuracy"] == 1.0 and report["sets"]["high"]["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("key", "settings"),
    [("evaluation.temperature", {}), ("data.eval.mine.temperature", {"temperature": 0.005})],
)  # fmt: skip
def test_every_temperature_that_an_engine_is_asked_for_is_named_by_its_setting(tiny_llama, key, settings):
    shared = 0.3 if settings else 0.005
    config = validate(RunConfig, of(tiny_llama, {"mine": rows(2, **settings)}, evaluation={"temperature": shared}))
    assert config.temperatures == {"rollout.temperature": 1.0, key: 0.005}


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ({"eval": rows(2), "more": rows(2)}, "data.eval: 'eval' cannot name one of several held-out sets"),
        ({" ": rows(2)}, "data.eval: ' ' cannot name one of several"),
        ({"mine": rows(2, samples=4)}, "data.eval.mine.samples: 4 greedy responses to a row are one and the same"),
    ],
)
def test_settings_of_sets_that_cannot_be_are_refused(tiny_llama, held_out, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        validate(RunConfig, of(tiny_llama, held_out))


def test_an_evaluation_without_its_section_has_its_defaults_and_their_checks(tiny_llama):
    values = {**of(tiny_llama, rows(2)), "evaluation": None}
    config = evaluate.evaluating(validate(RunConfig, values))
    assert config.evaluation == EvaluationConfig() and config.data == validate(RunConfig, values).data
    with pytest.raises(ConfigError, match=r"^data.eval.samples: 2 greedy responses"):
        evaluate.evaluating(validate(RunConfig, {**of(tiny_llama, rows(2, samples=2)), "evaluation": None}))


# rlcore eval


def test_a_checkpoint_is_evaluated_as_its_run_did(tmp_path, tiny_llama, capsys):
    """LoRA is merged into what is saved. The run folder stands for its latest checkpoint, whose step is the result's."""
    values = of(
        tiny_llama, {"seeds": rows(6, **SEEDS), "greedy": rows(4)}, sft={"steps": 3, "optimizer": {"lr": 0.003}},
        model={"path": str(tiny_llama), "precision": "fp32", "lora": {"rank": 4}}, logging={"tensorboard": True},
    )  # fmt: skip
    values["data"]["train"] = {"name": "arithmetic", "options": {"count": 16, "max_value": 9}}
    status, trained = start(tmp_path, values, command="sft", name="trained")
    assert status == 0
    theirs = json.loads((trained / "eval.json").read_text())
    del values["data"]["train"], values["sft"]
    checkpoint = trained / "checkpoints" / "step_000003"
    for number, model in enumerate((trained, checkpoint, checkpoint / "model")):
        status, folder = start(tmp_path, values, "--model", str(model), name=f"evaluated{number}")
        ours = json.loads((folder / "eval.json").read_text())
        assert status == 0 and ours["step"] == theirs["step"] == 3
        assert ours["all"]["score"] == theirs["all"]["score"]
        drawn, expected = samples_of(folder), samples_of(trained, step=3, phase="eval")
        assert [{**one, "policy_version": 3} for one in drawn] == expected and len(drawn) == 6 * 4 + 4
    (row,) = lines(folder / "metrics.jsonl")
    assert row["step"] == 3 and row["timing/evaluate"] > 0 and row["eval/seeds/pass@2"] == ours["sets"]["seeds"]["pass@2"]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/greedy/score")] == [
        (3, pytest.approx(row["eval/greedy/score"]))
    ]
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "environment.json", "history.jsonl", "run.lock", "metrics.jsonl", "samples.jsonl", "eval.json",
        "tensorboard",
    }  # fmt: skip
    capsys.readouterr()
    status, base = start(tmp_path, values, name="base")
    assert status == 0 and json.loads((base / "eval.json").read_text())["step"] == 0
    assert [one["response"] for one in samples_of(base)] == [one["response"] for one in samples_of(trained, step=0)]
    assert [one["response"] for one in samples_of(base)] != [one["response"] for one in drawn]
    out = capsys.readouterr().out
    assert "held-out rows" in out and "eval.json           the last evaluation" in out
    assert undocumented(lines(trained / "metrics.jsonl")[0].keys() | row.keys()) == ["step"]


def test_a_tower_from_elsewhere_is_evaluated_too(tmp_path, models):
    """Before training it is the run file's; a checkpoint has it inside."""
    folders = [models / f"evaluated_vl_{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        registry.load("models", "tiny_qwen2_5_vl")(folder, hidden_size=64, layers=2, vision_layers=2, seed=seed)
    figures = {"name": "geometry_figures", "options": {"kinds": ["count"], "count": 4}}
    values = of(
        folders[0], {**figures, "options": {**figures["options"], "split": "test"}}, vision={"path": str(folders[1])},
        model={"path": str(folders[0]), "precision": "fp32", "freeze": ["vision"]},
        optimizer={"lr": 0.05}, train={"steps": 1, "prompts_per_step": 2, "max_tokens_per_microbatch": 512},
    )  # fmt: skip
    values["data"]["train"] = figures
    status, trained = start(tmp_path, values, command="grpo", name="trained")
    assert status == 0
    before, after = (samples_of(trained, step=step, phase="eval") for step in (0, 1))
    _, first = start(tmp_path, values, name="first")
    _, last = start(tmp_path, values, f"vision.path={folders[0]}", "--model", str(trained), name="last")
    own, _ = start(tmp_path, {**values, "vision": {}}, name="own")
    responses = [[one["response"] for one in samples_of(folder)] for folder in (first, last, tmp_path / "own")]
    assert own == 0 and responses[0] == [one["response"] for one in before] != responses[2]
    assert responses[1] == [one["response"] for one in after] != responses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": []}, "reward: must list at least one reward, by which responses are scored"),
        ({"data": {"max_prompt_tokens": 64}, "evaluation": None}, "data.eval: must be set: the rows to evaluate on"),
        ({"evaluation": {"by": ["kind"]}}, "evaluation.by: no held-out row has a text or number in a column 'kind'"),
        ({"evaluation": {"max_new_tokens": 4000}}, "data.max_prompt_tokens: 64 and 4000 new tokens are 4064, more"),
        ({"reward": {"gsm8k": [{"name": "math"}]}}, "reward: the row arithmetic-test:0 is from 'arithmetic', which has no"),
    ],
)  # fmt: skip
def test_an_evaluation_that_cannot_start_says_why_and_leaves_nothing(tmp_path, tiny_llama, capsys, changes, message):
    status, folder = start(tmp_path, of(tiny_llama, rows(3), **changes))
    said = capsys.readouterr().err
    assert status == 2 and said.startswith(f"rlcore: {message}") and len(said.splitlines()) == 1
    assert not folder.exists()


def test_rows_that_are_too_long_are_counted_and_shown(tmp_path, tiny_llama, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps({"prompt": "7 + " * length, "answer": "7", "data_source": name}) + "\n"
        for length, name in ((1, "a"), (200, "a"), (1, "b"), (1, "a"), (300, "b"))
    ))  # fmt: skip
    held_out = {"path": str(tmp_path / "rows.jsonl"), "options": {"source": "data_source"}}
    status, folder = start(tmp_path, of(tiny_llama, held_out))
    report = json.loads((folder / "eval.json").read_text())["sets"]["eval"]
    assert status == 0 and (report["rows"], report["dropped_long"]) == (3, 2)
    assert {name: part["rows"] for name, part in report["by"]["source"].items()} == {"a": 2, "b": 1}
    said = capsys.readouterr().out
    assert "warning: data.eval: 2 of 5 rows are left out" in said
    line = next(line.split() for line in said.splitlines() if line.startswith("eval "))
    assert line[1] == "3" and line[-1] == "2"
    assert [one["source"] for one in samples_of(folder)] == ["a", "b", "a"]


def test_results_that_cannot_be_written_name_the_folder(tmp_path):
    sinks = Sinks(tmp_path, tensorboard=False)
    (tmp_path / ".eval.json.partial").mkdir()
    with pytest.raises(RunError, match=rf"^{tmp_path}: step 3 cannot be written: "):
        sinks.write(3, {"eval/score": 1.0}, (), {"step": 3})
    sinks.close()


# rlcore sft without training rows


@pytest.mark.parametrize("with_rewards", [False, True])
def test_supervised_training_without_training_rows_evaluates_and_changes_nothing(tmp_path, tiny_llama, capsys, with_rewards):
    """Whatever evaluation.before and at_end say."""
    values = of(
        tiny_llama, rows(13), sft={"steps": 5, "rows_per_step": 4}, logging={"tensorboard": True},
        evaluation={"before": False, "at_end": False, "max_new_tokens": 6},
    )  # fmt: skip
    values["data"]["train"] = None
    values["reward"] = values["reward"] if with_rewards else []
    status, folder = start(tmp_path, values, command="sft")
    report = json.loads((folder / "eval.json").read_text())["sets"]["eval"]
    assert status == 0 and (report["loss_rows"], report["dropped_long"]) == (13, 0)
    assert ("score" in report) == with_rewards and len(samples_of(folder)) == 13 * with_rewards
    (row,) = lines(folder / "metrics.jsonl")
    assert row["step"] == 0 and row["eval/loss"] == report["loss"] and report["loss_tokens"] > 26
    assert undocumented(row) == ["step"]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert events.Scalars("eval/loss")[0].value == pytest.approx(report["loss"])
    assert not (folder / "checkpoints").exists()
    said = capsys.readouterr().out
    assert "held-out rows" in said and "before training" not in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"max_prompt_tokens": 64}}, "data: names no rows; set data.train to train, or data.eval to evaluate only"),
        ({"data": {"max_prompt_tokens": 64, "eval": "untold"}}, "rows:1: no target to imitate"),
    ],
)  # fmt: skip
def test_what_has_nothing_to_imitate_is_refused(tmp_path, tiny_llama, capsys, changes, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "answer": "2"}) + "\n")
    if changes["data"].get("eval"):
        changes["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl")}
    values = of(tiny_llama, rows(3), sft={"steps": 5}, evaluation=None, reward=[], **changes)
    assert start(tmp_path, values, command="sft")[0] == 2
    assert capsys.readouterr().err.startswith(f"rlcore: {message}")


# worker processes


def test_worker_processes_evaluate_as_one_process_does(tmp_path, tiny_llama, cluster):
    values = of(tiny_llama, rows(13, **SEEDS), sft={"epochs": 1, "rows_per_step": 4})
    for command, devices in (("eval", 3), ("sft", 2)):
        ray = [f"placement={{kind: ray, devices: {devices}}}"]
        (_, one), (status, two) = (
            start(tmp_path, values, *place, command=command, name=f"{command}{len(place)}") for place in ([], ray)
        )
        assert status == 0
        reports = [json.loads((folder / "eval.json").read_text()) for folder in (one, two)]
        losses = [report["sets"]["eval"].pop("loss", None) for report in reports]
        assert losses[0] == (pytest.approx(losses[1], rel=1e-6) if command == "sft" else None)
        assert reports[0] == reports[1] and reports[0]["sets"]["eval"]["rows"] == 13
        assert samples_of(one) == samples_of(two)
