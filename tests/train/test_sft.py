"""Supervised fine-tuning: which tokens are imitated, epochs that are epochs, losses, evaluation, bad rows."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from run_files import settings, write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlcore import registry
from rlcore.cli.main import main
from rlcore.config.loader import validate
from rlcore.config.schema import RunConfig
from rlcore.config.sections import DatasetConfig
from rlcore.data.rows import load_rows
from rlcore.errors import ConfigError
from rlcore.model.packing import longest, microbatches
from rlcore.model.resolved import ResolvedModel
from rlcore.runtime.placement import local
from rlcore.runtime.watchdog import Watchdog
from rlcore.train.sft import check_target, given, imitated
from rlcore.types import Batch, Group, Row

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
THINKS = (  # drops the thoughts of turns before the last question, as Qwen3's template does
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if loop.last else message.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def message(role, content):
    return {"role": role, "content": content}


TURNS = [
    message("user", "Hi"), message("assistant", "Yes?"), message("user", "What is 1 + 1?"), message("assistant", "It is 2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def family(tiny_llama):
    return registry.load("families", "llama")(tiny_llama)


@pytest.fixture
def resolved(tiny_llama, backend):
    return ResolvedModel(validate(RunConfig, settings(tiny_llama, sft={"steps": 1})), backend)


def row_of(turns, images=()):
    """A row with this chat; its first turn of the assistant is the target."""
    first = next(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    return Row("a:1", turns[:first], target=turns[first]["content"], rest=turns[first + 1 :], images=images)


def jsonl(folder, *values, name="chats.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def marked(family, prompt):
    """The text of a sequence, imitated tokens in brackets."""
    chosen = set(prompt.imitated.tolist())
    tokens = [family.tokenizer.decode([token]) for token in prompt.token_ids]
    text = "".join(f"[{token}]" if place in chosen else token for place, token in enumerate(tokens))
    return text.replace("][", "")


def test_each_turn_of_the_assistant_and_its_end_are_imitated_and_nothing_else(family):
    (prompt,) = family.encode_conversation(row_of(TURNS))
    assert marked(family, prompt) == (
        f"{USER}Hi{END}{ASSISTANT}[Yes?<|im_end|>]\n{USER}What is 1 + 1?{END}{ASSISTANT}[It is 2<|im_end|>]"
    )
    assert family.conversation_length(row_of(TURNS)) == len(prompt.token_ids)


def test_the_tokens_of_a_conversation_are_counted_once(family):
    """As long as what is forwarded, so that a cap of that holds it."""
    (prompt,) = family.encode_conversation(row_of(TURNS))
    batch = Batch.of([Group(prompt, [given(prompt)])])
    (row,) = microbatches(batch, longest(batch))
    assert longest(batch) == row.tokens == len(prompt.token_ids) and len(row.targets) == len(prompt.imitated)


def test_a_single_answer_is_imitated_as_it_would_be_sampled(family):
    row = row_of(TURNS[:2])
    (prompt,) = family.encode_conversation(row)
    asked, answer = family.encode(row).token_ids, family.encode_response("Yes?")
    assert prompt.token_ids == asked + answer
    assert prompt.imitated.tolist() == list(range(len(asked), len(asked) + len(answer)))


def test_a_turn_that_the_template_changes_afterwards_is_imitated_as_it_was_written(tiny_llama):
    """Every turn once, after exactly the text that the model is given when it has to write it."""
    family = registry.load("families", "llama")(tiny_llama)
    family.use_template(THINKS, {})
    turns = [*TURNS[:1], message("assistant", "a</think>Yes?"), *TURNS[2:]]
    first, second = family.encode_conversation(row_of(turns))
    assert marked(family, first) == f"{USER}Hi{END}{ASSISTANT}[a</think>Yes?<|im_end|>]"
    assert marked(family, second) == (
        f"{USER}Hi{END}{ASSISTANT}Yes?{END}{USER}What is 1 + 1?{END}{ASSISTANT}[It is 2<|im_end|>]"
    )


def test_without_a_chat_template_each_turn_is_imitated_too(tiny_llama):
    family = registry.load("families", "llama")(tiny_llama)
    family.processor.chat_template = None
    first, second = family.encode_conversation(row_of(TURNS))
    assert marked(family, first) == "Hi[Yes?<|im_end|>]"
    assert marked(family, second) == "Hi\nYes?\nWhat is 1 + 1?[It is 2<|im_end|>]"


def test_images_stay_with_the_turns_that_show_them(tiny_vision):
    family = registry.load("families", "qwen2_5_vl")(tiny_vision)
    images = [Image.new("RGB", (56, 56), color) for color in ("red", "blue")]
    asked = message("user", [{"type": "image"}, {"type": "text", "text": "Color?"}])
    row = row_of([asked, message("assistant", "Red"), asked, message("assistant", "Blue")], images)
    (prompt,) = family.encode_conversation(row)
    assert prompt.vision["image_grid_thw"].tolist() == [[1, 4, 4]] * 2
    asked = f"{USER}<|vision_start|>{'<|image_pad|>' * 4}<|vision_end|>Color?{END}{ASSISTANT}"
    assert marked(family, prompt) == f"{asked}[Red<|im_end|>]\n{asked}[Blue<|im_end|>]"
    assert len(family.encode(row).row.images) == 1, "the prompt has only its own"
    assert family.conversation_length(row) == len(prompt.token_ids)


@pytest.mark.parametrize("pictures", [False, True])
def test_the_loss_is_transformers_own_on_the_same_labels(pictures, tiny_vision, tiny_llama, tmp_path, backend):
    """Mean over the imitated tokens of the batch, packed without padding, to 1e-6; and the gradient of every weight, tower
    included."""
    folder = tiny_vision if pictures else tiny_llama
    content = "<image>Which? <image>" if pictures else "Which?"
    chats = [{"messages": [message("user", content), *TURNS[1 : 2 + 2 * (number % 2)]]} for number in range(3)]
    for number, chat in enumerate(chats if pictures else ()):
        chat["images"] = [str(image(tmp_path, 3 * number + place)) for place in range(2)]
    path = jsonl(tmp_path, *chats)
    options = {"messages": "messages", "answer": None, **({"images": "images"} if pictures else {})}
    data = {"train": {"path": str(path), "options": options}, "max_prompt_tokens": 64}
    config = validate(RunConfig, settings(folder, sft={"steps": 1, "optimizer": {"max_grad_norm": 1e9}}, data=data))
    run = local(ResolvedModel(config, backend), Watchdog(0, tmp_path))
    run.load("sft")
    actor = run._of["actor"].members[0].worker.actor
    rows = load_rows(DatasetConfig(path=str(path), options=options))
    prompts = [prompt for row in rows for prompt in actor.family.encode_conversation(row)]
    seen = {}
    actor.learner.optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: weight.grad.clone() for name, weight in actor.model.named_parameters()})
    )
    loss = run.actor.update(imitated(prompts, run))["sft/loss"]
    model = (AutoModelForImageTextToText if pictures else AutoModelForCausalLM).from_pretrained(folder)
    count = sum(len(prompt.imitated) for prompt in prompts)
    theirs = 0.0
    for prompt in prompts:
        labels = torch.full((len(prompt.token_ids),), -100)
        labels[prompt.imitated] = torch.tensor(prompt.token_ids)[prompt.imitated]
        ids = torch.tensor([prompt.token_ids])
        shown = dict(prompt.vision or {}, mm_token_type_ids=(ids == model.config.image_token_id).int()) if pictures else {}
        one = model(input_ids=ids, labels=labels[None], num_items_in_batch=count, **shown).loss
        one.backward()
        theirs += one.item()
    assert loss == pytest.approx(theirs, rel=1e-6)
    for name, weight in model.named_parameters():
        assert torch.allclose(seen[name], weight.grad, rtol=1e-4, atol=2e-6), name


def image(folder, number):
    path = folder / f"{number}.png"
    Image.effect_noise((56, 56 + 28 * (number % 2)), 90).convert("RGB").save(path)
    return path


def run_sft(tmp_path, model, *overrides, name="run", **sections):
    file = write(tmp_path, model, **{"sft": {"steps": 2, "rows_per_step": 2, "log_every": 1}, **sections})
    folder = tmp_path / name
    status = main(["sft", str(file), *overrides, "--run-dir", str(folder)])
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    return status, [json.loads(line) for line in lines]


def test_an_epoch_has_every_row_once(tmp_path, tiny_llama, monkeypatch):
    """10 rows, 4 a step: three steps an epoch when alone, five for two epochs, the last with what is left."""
    sizes, rows = [], []
    real = registry.load("families", "llama").encode_conversation
    monkeypatch.setattr(
        registry.load("families", "llama"), "encode_conversation", lambda self, row: rows.append(row.id) or real(self, row)
    )
    from rlcore.model.actor import TorchActor

    update = TorchActor.step
    monkeypatch.setattr(TorchActor, "step", lambda self, batch: sizes.append(len(batch.groups)) or update(self, batch))
    data = {"train": {"name": "arithmetic", "options": {"count": 10}}, "max_prompt_tokens": 64}
    for epochs, expected in ((1, [4, 4, 2]), (2, [4, 4, 4, 4, 4])):
        sizes.clear()
        sft = {"epochs": epochs, "rows_per_step": 4}
        status, metrics = run_sft(tmp_path, tiny_llama, name=f"run{epochs}", data=data, sft=sft)
        assert status == 0 and sizes == expected and len(metrics) == len(expected)
        assert len(set(rows)) == 10
    status, metrics = run_sft(tmp_path, tiny_llama, name="first", data=data, sft={"epochs": 5, "steps": 2, "rows_per_step": 4})
    assert len(metrics) == 2


def test_the_learning_rate_falls_over_the_steps_of_the_epochs(tmp_path, tiny_llama):
    data = {"train": {"name": "arithmetic", "options": {"count": 8}}, "max_prompt_tokens": 64}
    sft = {"epochs": 1, "rows_per_step": 2, "optimizer": {"lr": 1e-2, "schedule": "linear", "min_lr": 1e-3}}
    _, metrics = run_sft(tmp_path, tiny_llama, data=data, sft=sft)
    assert [line["lr"] for line in metrics] == pytest.approx([1e-2, 7e-3, 4e-3, 1e-3])


def test_the_held_out_loss_is_evaluated_at_its_interval_and_in_tensorboard(tmp_path, tiny_llama):
    data = {
        "train": {"name": "arithmetic", "options": {"count": 8}}, "max_prompt_tokens": 64,
        "eval": {"name": "arithmetic", "options": {"count": 5, "split": "test"}},
    }  # fmt: skip
    sections = {"data": data, "evaluation": {"every": 2, "max_new_tokens": 4}, "logging": {"tensorboard": True}}
    sft = {"steps": 4, "rows_per_step": 2, "optimizer": {"lr": 1e-2}}
    status, metrics = run_sft(tmp_path, tiny_llama, sft=sft, **sections)
    losses = {line["step"]: line["eval/loss"] for line in metrics if "eval/loss" in line}
    assert status == 0 and set(losses) == {0, 2, 4} and losses[4] < losses[0]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 2, 4]
    assert [event.step for event in events.Scalars("eval/accuracy")] == [0, 2, 4]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (TURNS[:1], "no target to imitate, and no turn of the assistant"),
        (TURNS[:3], "the chat ends with a message that the assistant does not answer"),
        ([*TURNS[:1], message("assistant", " "), *TURNS[2:]], "message 2, the assistant's, must be a text that is not empty"),
        (TURNS[1:2], "the prompt is a list without messages"),
        ([*TURNS[:3], message("assistant", "2<|im_end|>3")], "the answer holds token 2, which ends a response, before its end"),
        ([*TURNS[:3], message("assistant", "2 " * 300)], "prompt and target need .* more than train.max_tokens_per_microbatch"),
        ([message("user", "Hi"), {**TURNS[1], "tool_calls": [{}]}], "a chat message has tool_calls, which are not read"),
    ],
)  # fmt: skip
def test_a_chat_that_cannot_be_imitated_is_named(turns, message, tmp_path, resolved):
    path = jsonl(tmp_path, {"messages": turns})
    with pytest.raises(ConfigError, match=rf"^chats:?(\.jsonl)?:?1: {message}"):
        for row in load_rows(DatasetConfig(path=str(path), options={"messages": "messages", "answer": None})):
            check_target(row, resolved)
