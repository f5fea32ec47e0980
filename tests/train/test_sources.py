"""Rows of several sources in one run: mixtures, rewards by source, metrics by source."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from run_files import write

from rlcore.cli.main import main


def one(response, answer, fields):
    return 1.0


def two(response, answer, fields):
    return 2.0


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    def run(model, **sections):
        file = write(tmp_path, model, **sections)
        status = main(["grpo", str(file), "--run-dir", str(tmp_path / "run")])
        lines = [
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            for path in (tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "samples.jsonl")
        ]
        return status, *lines, capsys.readouterr().err

    return run


def rows_of(tmp_path, *sources):
    """A file of text rows, of each source one."""
    rows = [{"prompt": f"What is {number}?", "answer": "1", "data_source": name} for number, name in enumerate(sources)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "options": {"source": "data_source"}}


def test_pictures_and_text_of_several_data_sets_are_mixed_by_weight(start, tiny_vision, tmp_path):
    Image.effect_noise((56, 56), 90).save(tmp_path / "a.png")
    (tmp_path / "shown.jsonl").write_text(json.dumps({"prompt": "<image>What?", "answer": "1", "images": ["a.png"]}) + "\n")
    shown = {"path": str(tmp_path / "shown.jsonl"), "options": {"images": "images"}, "source": "shown", "weight": 3}
    data = {"train": [shown, {"name": "arithmetic", "options": {"count": 8}, "weight": 1}], "max_prompt_tokens": 64}
    table = {"shown": [{"name": f"{__name__}.one"}], "arithmetic": [{"name": f"{__name__}.two"}]}
    train = {"steps": 2, "prompts_per_step": 12, "max_tokens_per_microbatch": 512}
    status, metrics, samples, _ = start(tiny_vision, data=data, reward=table, train=train)
    assert status == 0
    assert {sample["row"].split("/")[0]: sample["score"] for sample in samples} == {"shown": 1, "arithmetic": 2}
    for line in metrics:
        assert (line["source/shown/score"], line["source/arithmetic/score"]) == (1, 2)
        assert line["source/shown/samples"] + line["source/arithmetic/samples"] == 48
        assert line["source/shown/samples"] > line["source/arithmetic/samples"]


def test_each_row_is_scored_by_the_reward_of_its_source(start, tiny_llama, tmp_path):
    once, twice = {"name": f"{__name__}.one"}, {"name": f"{__name__}.two"}
    table = {"a/b": [{**once, "weight": 0.5}], "c": [once, twice]}
    data = {"train": rows_of(tmp_path, "a/b", "c", "a/b", "c"), "max_prompt_tokens": 64}
    train = {"steps": 1, "prompts_per_step": 4, "max_tokens_per_microbatch": 256}
    _, (line,), samples, _ = start(tiny_llama, data=data, reward=table, train=train)
    assert [sample["score"] for sample in sorted(samples, key=lambda one: one["row"])][::4] == [0.5, 3.0, 0.5, 3.0]
    assert (line["source/a/b/score"], line["source/c/score"]) == (0.5, 3.0)


@pytest.mark.parametrize("check", ["all", "drawn"])
def test_a_source_without_a_reward_is_named_with_its_row(check, start, tiny_llama, tmp_path):
    data = {"train": rows_of(tmp_path, "math", "mth"), "max_prompt_tokens": 64, "check": check}
    status, _, _, said = start(tiny_llama, data=data, reward={"math": [{"name": "math"}]})
    assert status == 2
    assert "reward: the row rows:2 is from 'mth', which has no reward in the table; did you mean 'math'?" in said
    assert (tmp_path / "run").exists() == (check == "drawn"), "nothing is written for what is known before the run"


def test_the_chat_template_of_the_run_file_and_its_variables(start, tiny_llama, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{% if polite %}Please: {% endif %}{{ messages[-1].content }}\n")
    data = {"train": {"name": "arithmetic", "options": {"count": 4}}, "max_prompt_tokens": 64, "chat_template": str(template)}
    prompts = []
    for options in ({}, {"polite": True}):
        status, _, samples, _ = start(tiny_llama, data={**data, "chat_template_options": options})
        assert status == 0
        prompts.append({sample["prompt_tokens"] for sample in samples})
        saved = tmp_path / "run" / "checkpoints" / "step_000002" / "model" / "chat_template.jinja"
        assert saved.read_text() == template.read_text()
        (tmp_path / "run").rename(tmp_path / f"run-{len(prompts)}")
    assert min(prompts[1]) > max(prompts[0])
    status, _, _, said = start(tiny_llama, data={**data, "chat_template_options": {"polit": True}})
    assert status == 2
    assert "data.chat_template_options.polit: the chat template has no such variable; did you mean 'polite'?" in said
    status, _, _, said = start(tiny_llama, data={**data, "chat_template": "{% if %}"})
    assert status == 2 and "data.chat_template: not a valid template" in said
