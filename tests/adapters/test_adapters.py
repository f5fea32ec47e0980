"""Model families: `encode` and `hidden` match transformers, and nothing is declared twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_files import settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saving import published
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlcore.config.schema import RunConfig
from rlcore.config.sections import ModelConfig, VisionConfig
from rlcore.data.images import Pictures
from rlcore.distributed import fsdp, parts
from rlcore.errors import ConfigError, RunError
from rlcore.model.loading import family_of, resolve
from rlcore.model.packing import microbatches
from rlcore.model.resolved import ResolvedModel
from rlcore.train.dpo import check_pair
from rlcore.train.sft import check_target
from rlcore.types import Batch, Group, Prompt, Row, Sample

TEXT_MODELS = ("tiny_llama", "tiny_qwen3", "tiny_qwen3_moe")
VISION_MODELS = ("tiny_qwen2_vl", "tiny_qwen2_5_vl", "tiny_qwen3_vl")
MODELS = (*TEXT_MODELS, *VISION_MODELS)
SIZES = ((112, 112), (150, 90), (60, 200))  # width, height


@pytest.fixture(autouse=True)
def _one_thread(backend):
    torch.set_num_threads(1)
    yield
    backend.prepare()


def made(name: str, models: Path):
    config = ModelConfig(path=name)
    folder = resolve(config, models)
    return folder, family_of(folder, config)


def text_row(text: str = "What is 12 + 30?") -> Row:
    return Row("text", [{"role": "system", "content": "Count."}, {"role": "user", "content": text}])


def image_row(images: int) -> Row:
    pictures = [noise(*SIZES[index], seed=index) for index in range(images)]
    parts = [part for _ in pictures for part in ({"type": "image"}, {"type": "text", "text": "and then"})]
    content = [*parts, {"type": "text", "text": "How many circles are there?"}]
    return Row(f"{images} images", [{"role": "user", "content": content}], images=pictures)


def noise(width: int, height: int, seed: int) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), generator=seeded(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def batch_of(prompts: list[Prompt], responses: list[list[int]]) -> Batch:
    """One sample of random tokens for each length listed."""
    groups = []
    for prompt, lengths in zip(prompts, responses, strict=True):
        tokens = [torch.randint(8, 500, (length,), generator=seeded(length)).tolist() for length in lengths]
        groups.append(Group(prompt, [Sample(ids, [0.0] * len(ids), "", "length", 0) for ids in tokens]))
    return Batch.of(groups)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed_logprobs(family, model, batch: Batch, cap: int) -> Tensor:
    logprobs = torch.full((len(batch.rollout_logprobs),), torch.nan)
    for packed in microbatches(batch, cap):
        logits = family.hidden(model, packed)[packed.predictors] @ family.head(model).T
        logprobs[packed.index] = logits.log_softmax(-1).gather(-1, packed.targets[:, None])[:, 0]
    return logprobs


def sample_logprobs(model, image_token: int | None, batch: Batch) -> Tensor:
    """Each sample alone through transformers' own forward pass."""
    logprobs = []
    for group in batch.groups:
        prompt = group.prompt
        for sample in group.samples:
            token_ids = torch.tensor([[*prompt.token_ids, *sample.token_ids]])
            vision = dict(prompt.vision, mm_token_type_ids=(token_ids == image_token).int()) if prompt.vision else {}
            logits = model(input_ids=token_ids, use_cache=False, **vision).logits[0, len(prompt.token_ids) - 1 : -1]
            logprobs.append(logits.log_softmax(-1).gather(-1, torch.tensor(sample.token_ids.tolist())[:, None])[:, 0])
    return torch.cat(logprobs)


@torch.no_grad()
@pytest.mark.parametrize("cap", [4096, 70])
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_packed_text_has_the_logprobs_of_each_sample_alone(name, cap, models):
    folder, family = made(name, models)
    prompts = [family.encode(text_row(text)) for text in ("What is 12 + 30?", "How many are left? " * 4, "Hi")]
    batch = batch_of(prompts, [[5, 1, 17], [9], [3, 3, 11, 2]])
    ours = packed_logprobs(family, family.load(folder, torch.float32), batch, cap)
    theirs = sample_logprobs(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa"), None, batch)
    assert (ours - theirs).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("images", "cap"), [([0, 1, 2], 4096), ([0, 1, 2], 110), ([0], 4096), ([2, 1], 110)])
@pytest.mark.parametrize("name", VISION_MODELS)
def test_packed_images_have_the_logprobs_of_each_sample_alone(name, images, cap, models):
    folder, family = made(name, models)
    batch = batch_of([family.encode(image_row(count)) for count in images], [[5, 1, 17], [9, 12], [3, 3, 11]][: len(images)])
    ours = packed_logprobs(family, family.load(folder, torch.float32), batch, cap)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
    assert (ours - sample_logprobs(model, model.config.image_token_id, batch)).abs().max() <= 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_packed_gradients_are_those_of_each_sample_alone(name, models):
    folder, family = made(name, models)
    prompts = [family.encode(text_row()), family.encode(image_row(2) if name in VISION_MODELS else text_row("Hi"))]
    batch = batch_of(prompts, [[5, 1, 17], [9, 12]])
    model = family.load(folder, torch.float32)
    packed_logprobs(family, model, batch, 4096).sum().backward()
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model = type(model).from_pretrained(folder, attn_implementation="sdpa")
    sample_logprobs(model, getattr(model.config, "image_token_id", None), batch).sum().backward()
    theirs = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@torch.no_grad()
@pytest.mark.parametrize("name", VISION_MODELS)
def test_an_image_placeholder_that_a_response_drew_is_a_token_like_any_other(name, models):
    folder, family = made(name, models)
    prompt, image = family.encode(image_row(1)), family.processor.image_token_id
    response = [5, image, 17, image, 3]
    model = family.load(folder, torch.float32)
    sample = Sample(response, [0.0] * len(response), "", "length", policy_version=0)
    ours = packed_logprobs(family, model, Batch.of([Group(prompt, [sample])]), 4096)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
    read = theirs(input_ids=torch.tensor([prompt.token_ids]), position_ids=prompt.position_ids[:, None], **prompt.vision)
    positions = (torch.arange(len(response)) + prompt.next_position).expand(3, -1)[:, None]
    rest = theirs(input_ids=torch.tensor([response]), position_ids=positions, past_key_values=read.past_key_values)
    logits = torch.cat([read.logits[0, -1:], rest.logits[0, :-1]])
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
    assert (ours - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_an_image_changes_what_follows(models):
    folder, family = made("tiny_qwen2_5_vl", models)
    model = family.load(folder, torch.float32)
    row = image_row(1)
    other = Row("other", row.messages, images=[noise(*SIZES[0], seed=9)])
    first, second = (packed_logprobs(family, model, batch_of([family.encode(r)], [[8]]), 4096) for r in (row, other))
    assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("name", VISION_MODELS)
def test_positions_are_those_of_the_model(name, images, models):
    folder, family = made(name, models)
    model = family.load(folder, torch.float32)
    prompt = family.encode(image_row(images))
    token_ids = torch.tensor([prompt.token_ids])
    types = (token_ids == model.config.image_token_id).int()
    theirs, offset = model.model.get_rope_index(token_ids, types, image_grid_thw=prompt.vision["image_grid_thw"])
    assert torch.equal(prompt.position_ids, theirs[:, 0])
    assert prompt.next_position == len(prompt.token_ids) + int(offset)


def test_positions_of_a_hand_made_prompt():
    from rlcore_adapters.models.qwen2_vl import multimodal_positions  # here: it needs a prepared backend

    positions = multimodal_positions([7, 9, 9, 9, 9, 9, 9, 7], 9, [[1, 2, 3]])
    assert positions.tolist() == [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]]


@pytest.mark.parametrize("images", [0, 1, 2, 3])
@pytest.mark.parametrize("name", VISION_MODELS)
def test_the_prompt_length_is_known_without_the_pixels(name, images, models, monkeypatch):
    _, family = made(name, models)
    row = image_row(images)
    length = len(family.encode(row).token_ids)
    monkeypatch.setattr(type(family.processor.image_processor), "preprocess", None)
    assert family.prompt_length(row) == length


@pytest.mark.parametrize(("name", "patch"), [("tiny_qwen2_vl", 14), ("tiny_qwen2_5_vl", 14), ("tiny_qwen3_vl", 16)])
def test_an_image_is_one_token_for_the_engine_and_one_a_merged_patch_for_the_trainer(name, patch, models):
    _, family = made(name, models)
    row = Row("a", image_row(1).messages, images=[noise(8 * patch, 8 * patch, seed=0)])
    prompt = family.encode(row)
    image = family.processor.image_token_id
    assert prompt.engine_token_ids.count(image) == 1
    assert prompt.token_ids.count(image) == 16
    assert prompt.vision["image_grid_thw"].tolist() == [[1, 8, 8]]
    assert len(prompt.vision["pixel_values"]) == 64
    assert [token for token in prompt.token_ids if token != image] == [t for t in prompt.engine_token_ids if t != image]


@pytest.mark.parametrize("name", VISION_MODELS)
def test_the_processor_of_transformers_makes_the_same_prompt(name, models):
    _, family = made(name, models)
    row = image_row(2)
    text = family.processor.apply_chat_template(list(row.messages), tokenize=False, add_generation_prompt=True)
    theirs = family.processor(text=[text], images=list(row.images), return_tensors="pt")
    prompt = family.encode(row)
    assert prompt.token_ids == theirs["input_ids"][0].tolist()
    assert torch.equal(prompt.vision["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize("name", MODELS)
def test_a_text_prompt_ends_where_the_assistant_begins(name, models):
    _, family = made(name, models)
    prompt = family.encode(text_row())
    assert family.tokenizer.decode(prompt.token_ids) == (
        "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.token_ids == prompt.engine_token_ids
    assert family.prompt_length(prompt.row) == len(prompt.token_ids)
    assert prompt.vision is None and prompt.position_ids is None


def test_text_in_parts_reads_like_text(models):
    _, family = made("tiny_llama", models)
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "12 + 30?"}]
    in_parts = Row("parts", [text_row().messages[0], {"role": "user", "content": parts}])
    assert family.encode(in_parts).token_ids == family.encode(text_row()).token_ids


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_has_the_text_that_its_tokens_are(name, models):
    _, family = made(name, models)
    for row in (text_row(), *([image_row(2)] if name in VISION_MODELS else [])):
        prompt = family.encode(row)
        assert family.tokenizer(prompt.text, add_special_tokens=False)["input_ids"] == prompt.engine_token_ids


def test_a_tokenizer_without_a_chat_template_reads_plain_text(models, tmp_path):
    folder, _ = made("tiny_llama", models)
    shutil.copytree(folder, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    family = family_of(tmp_path / "plain", ModelConfig(path="plain"))
    assert family.tokenizer.decode(family.encode(text_row()).token_ids) == "Count.\nWhat is 12 + 30?"


@pytest.mark.parametrize("name", MODELS)
def test_a_response_ends_its_turn(name, models):
    _, family = made(name, models)
    tokens = family.encode_response("It is 5.")
    assert tokens[-1] in family.stop_token_ids and not family.stop_token_ids & set(tokens[:-1])
    assert family.decode(tokens) == "It is 5."


def test_decoding_leaves_out_special_tokens_only(models):
    _, family = made("tiny_llama", models)
    token_ids = family.encode_response("<answer>7</answer>")
    assert token_ids == family.tokenizer("<answer>7</answer><|im_end|>")["input_ids"]
    assert len(token_ids) == 4
    assert token_ids[-1] in family.stop_token_ids
    assert family.decode(token_ids) == "<answer>7</answer>"


def test_turns_end_at_the_tokens_of_tokenizer_and_generation_config(models, tmp_path):
    folder, family = made("tiny_llama", models)
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    other = family_of(tmp_path / "model", ModelConfig(path="model"))
    assert other.stop_token_ids == family.stop_token_ids | {0, 5}


@pytest.mark.parametrize("name", MODELS)
def test_published_names_are_those_on_disk(name, models):
    folder, family = made(name, models)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        on_disk = set(weights.keys())
    names = dict(parts.published(family.load(folder, torch.float32).state_dict().items(), family.published))
    assert names.keys() == on_disk | {"lm_head.weight"}  # tied: the embedding, written once


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_a_model_folder(name, models, tmp_path):
    folder, family = made(name, models)
    model = family.load(folder, torch.float32)
    model.save_pretrained(tmp_path)
    family.save_processor(tmp_path)
    again = family_of(resolve(ModelConfig(path=str(tmp_path)), models), ModelConfig(path=str(tmp_path)))
    assert again.encode(text_row()).token_ids == family.encode(text_row()).token_ids
    loaded = again.load(tmp_path, torch.float32).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())
    assert "rlcore" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_dropped_out(name, models):
    folder, family = made(name, models)
    assert not any(module.training for module in family.load(folder, torch.float32).modules())


def test_a_text_model_names_the_row_with_images(models):
    _, family = made("tiny_llama", models)
    for read in (family.encode, family.prompt_length):
        with pytest.raises(ConfigError, match=r"2 images: the row has 2 images but the model reads text only; use a vision"):
            read(image_row(2))


def test_images_without_their_parts_are_an_error_naming_the_row(models):
    _, family = made("tiny_qwen2_5_vl", models)
    row = Row("row 7", text_row().messages, images=image_row(1).images)
    with pytest.raises(ConfigError, match="row 7: the messages have 0 image parts for 1 images; give each image one part"):
        family.encode(row)


def test_a_placeholder_in_the_text_is_an_error_naming_the_row(models):
    _, family = made("tiny_qwen2_5_vl", models)
    with pytest.raises(ConfigError, match=r"text: the chat template wrote 1 <\|image_pad\|> for 0 images"):
        family.prompt_length(text_row("What is <|image_pad|>?"))


PUBLISHED = {  # names in the weight files of Qwen2-VL-2B-Instruct, Qwen2.5-VL-3B-Instruct and Qwen3-VL-2B-Instruct
    "tiny_qwen2_vl": (
        "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.gate_proj.weight", "visual.patch_embed.proj.weight", "visual.blocks.0.attn.qkv.bias",
        "visual.blocks.0.mlp.fc1.weight", "visual.blocks.0.norm1.bias", "visual.merger.ln_q.bias", "visual.merger.mlp.2.weight",
    ),
    "tiny_qwen2_5_vl": (
        "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.k_proj.bias",
        "model.layers.0.mlp.up_proj.weight", "visual.patch_embed.proj.weight", "visual.blocks.0.attn.qkv.weight",
        "visual.blocks.0.mlp.gate_proj.bias", "visual.blocks.0.norm2.weight", "visual.merger.ln_q.weight",
        "visual.merger.mlp.0.bias",
    ),
    "tiny_qwen3_vl": (
        "model.language_model.embed_tokens.weight", "model.language_model.norm.weight",
        "model.language_model.layers.0.self_attn.q_norm.weight", "model.language_model.layers.0.mlp.down_proj.weight",
        "model.visual.patch_embed.proj.bias", "model.visual.pos_embed.weight", "model.visual.blocks.0.mlp.linear_fc2.weight",
        "model.visual.merger.norm.weight", "model.visual.deepstack_merger_list.1.linear_fc1.weight",
        "model.visual.deepstack_merger_list.0.norm.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VISION_MODELS)
def test_weights_have_the_names_of_the_published_checkpoints(name, models):
    folder, family = made(name, models)
    names = {family.hf_name(key) for key in family.load(folder, torch.float32).state_dict()}
    assert names.issuperset(PUBLISHED[name])
    assert {name.split(".")[0] for name in names} == {name.split(".")[0] for name in PUBLISHED[name]} | {"lm_head"}


# placeholders and features


@pytest.fixture
def two(models):
    """A family, its model, and two prompts with an image each, of other sizes."""

    def make(name):
        folder, family = made(name, models)
        pictures = {"square": noise(128, 128, seed=0), "narrow": noise(70, 150, seed=1)}
        rows = [Row(key, image_row(1).messages, images=[image]) for key, image in pictures.items()]
        return family, family.load(folder, torch.float32), [family.encode(row) for row in rows]

    return make


def tokens_of(prompt):
    return int(prompt.vision["image_grid_thw"].prod()) // 4


@torch.no_grad()
@pytest.mark.parametrize("name", VISION_MODELS)
def test_images_in_the_wrong_rows_are_named_although_there_are_as_many(name, two):
    family, model, prompts = two(name)
    wrong = [replace(one, vision=other.vision) for one, other in zip(prompts, reversed(prompts), strict=True)]
    (packed,) = microbatches(batch_of(wrong, [[3], [3]]), 4096)
    first, second = map(tokens_of, prompts)
    with pytest.raises(RunError, match=rf"^square: the prompt has {first} image placeholders, its images have {second} tokens"):
        family.hidden(model, packed)


@torch.no_grad()
def test_images_that_lack_features_or_are_absent_are_named(two):
    family, model, (first, second) = two("tiny_qwen3_vl")
    grids, count = second.vision["image_grid_thw"], tokens_of(second)
    faults = {
        (count, count - 1): {"image_embeds": torch.zeros(count - 1, 384), "image_grid_thw": grids},
        (count, count - 2): {**second.vision, "pixel_values": second.vision["pixel_values"][:-8]},
        (0, 0): None,
    }
    for (tokens, features), vision in faults.items():
        (packed,) = microbatches(batch_of([first, replace(second, vision=vision)], [[3], [3]]), 4096)
        found = rf"narrow: .* has {count} image placeholders, its images have {tokens} tokens and features of {features};"
        with pytest.raises(RunError, match=found):
            family.hidden(model, packed)


# pixel limits


def limited(name, models, **limits):
    folder = resolve(ModelConfig(path=name), models)
    return family_of(folder, ModelConfig(path=name), VisionConfig(**limits))


@pytest.mark.parametrize(("name", "unit"), [("tiny_qwen2_vl", 28), ("tiny_qwen2_5_vl", 28), ("tiny_qwen3_vl", 32)])
def test_an_image_is_scaled_to_the_limits_of_the_run_file(name, unit, models):
    row = Row("a", image_row(1).messages, images=[noise(400, 300, seed=0)])
    counts = {}
    for limits in ({}, {"max_pixels": 6 * unit**2}, {"min_pixels": 40 * unit**2, "max_pixels": 50 * unit**2}):
        family = limited(name, models, **limits)
        prompt = family.encode(row)
        assert len(prompt.token_ids) == family.prompt_length(row)
        counts[tuple(limits.values())] = prompt.token_ids.count(family.processor.image_token_id)
    own, small, between = counts.values()
    assert small <= 6 < 40 <= between <= 50 < own <= 64
    tiny = Row("a", row.messages, images=[noise(20, 20, seed=0)])
    assert limited(name, models, min_pixels=9 * unit**2).encode(tiny).token_ids.count(family.processor.image_token_id) == 9


FORMS = {  # as in published folders
    "pixels": {"min_pixels": 3136, "max_pixels": 50176},
    "edges": {"size": {"shortest_edge": 3136, "longest_edge": 50176}},
    "both": {"min_pixels": 3136, "max_pixels": 50176, "size": {"min_pixels": 3136, "max_pixels": 50176}},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_folders_limits_may_have_any_form_and_those_of_the_run_file_are_saved(form, models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(resolve(ModelConfig(path="tiny_qwen2_vl"), models), folder)
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())["image_processor"]
    settings.pop("size")
    file.unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | FORMS[form]))
    config, row = ModelConfig(path="x"), Row("a", image_row(1).messages, images=[noise(400, 300, seed=0)])
    lengths = [family_of(folder, config, VisionConfig(max_pixels=most)).prompt_length(row) for most in (None, 20000)]
    family_of(folder, config, VisionConfig(max_pixels=20000)).save_processor(folder)
    assert lengths[0] > lengths[1] == family_of(folder, config).prompt_length(row)


@pytest.mark.parametrize(
    ("name", "limits", "message"),
    [
        ("tiny_qwen2_vl", {"max_pixels": 783}, "max_pixels: 783 is less than one image token, 784 pixels; give at least"),
        ("tiny_qwen3_vl", {"max_pixels": 1023}, "max_pixels: 1023 is less than one image token, 1024 pixels; give"),
        ("tiny_qwen2_5_vl", {"max_pixels": 3135}, "max_pixels: with .* own min_pixels .* least 3136 and at most 3135 pixels;"),
        ("tiny_qwen3_vl", {"min_pixels": 65537}, "min_pixels: with .* own max_pixels .* least 65537 .* 65536 pixels; set"),
        ("tiny_llama", {"max_pixels": 5000}, "max_pixels: models of the family 'llama' have no such limit of images; remove"),
    ],
)
def test_limits_that_no_image_can_keep_are_refused(name, limits, message, models):
    with pytest.raises(ConfigError, match=rf"^vision\.{message}"):
        limited(name, models, **limits)


def test_a_folder_without_limits_needs_those_of_the_run_file(models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(resolve(ModelConfig(path="tiny_qwen3_vl"), models), folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["size"] = {"min_pixels": 3136, "max_pixels": 50176}  # transformers leaves these aside
    (folder / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"^model\.path: .* has no limits of an image .*; set vision\.min_pixels and"):
        family_of(folder, ModelConfig(path="x"), VisionConfig(max_pixels=50176))
    family = family_of(folder, ModelConfig(path="x"), VisionConfig(min_pixels=3136, max_pixels=50176))
    assert family.prompt_length(image_row(2)) == len(family.encode(image_row(2)).token_ids)


def test_an_image_too_thin_is_an_error_naming_the_row(models):
    _, family = made("tiny_qwen2_5_vl", models)
    row = Row("row 3", image_row(1).messages, images=[Image.new("RGB", (3000, 2))])
    with pytest.raises(ConfigError, match=r"row 3: image 0 \(3000x2 pixels\) does not fit the processor: .*200"):
        family.prompt_length(row)


def test_weights_that_lack_a_tensor_are_refused(models, tmp_path):
    folder, family = made("tiny_llama", models)
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(ConfigError, match=r"lack 9 tensors of this .* \(model\.layers\.4\..*is the folder complete\?"):
        family.load(tmp_path / "model", torch.float32)


def test_weights_of_other_shapes_are_refused(models, tmp_path):
    folder, family = made("tiny_llama", models)
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))
    with pytest.raises(ConfigError, match=r"12 tensors in .*down_proj.weight is \[128, 256\], not \[128, 100\], \.\.\.\)"):
        family.load(tmp_path / "model", torch.float32)


def test_weights_cut_short_are_refused(models, tmp_path):
    folder, family = made("tiny_llama", models)
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100_000])
    with pytest.raises(ConfigError, match=r"model\.path: .*model does not load: .*incomplete"):
        family.load(tmp_path / "model", torch.float32)


def test_sliding_windows_are_refused(models, tmp_path):
    folder, family = made("tiny_qwen3", models)
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": None}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **window}))
    with pytest.raises(ConfigError, match=r"sliding-window attention, which packed rows do not support; .*use_sliding_window"):
        family.load(tmp_path / "model", torch.float32)


def test_a_folder_without_a_tokenizer_says_so(models, tmp_path):
    folder, _ = made("tiny_llama", models)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    with pytest.raises(ConfigError, match=r"no usable tokenizer or processor files .*copy tokenizer\.json"):
        family_of(tmp_path, ModelConfig(path=str(tmp_path)))


HEADS = {"tied": (True, False), "untied": (False, False), "tied, with a head of its own": (True, True)}


def filled(family, folder: Path) -> torch.nn.Module:
    """The meta model with the folder's weights; tied weights stay tied, as they do when sharded over ranks."""
    model = family.meta_model(folder, torch.float32)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        fsdp.read(model, model, family.published, folder, torch.device("cpu"))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    return model


@pytest.fixture(params=HEADS)
def headed(request, models, tmp_path):
    """Makes a model folder by family: tied, untied, or config says tied but the files hold a separate head."""
    tied, own = HEADS[request.param]

    def make(name: str) -> tuple[Path, bool]:
        folder = tmp_path / "headed"
        shutil.copytree(resolve(ModelConfig(path=name, options={"tied": tied}), models), folder)
        if own:
            weights = load_file(folder / "model.safetensors")
            embedding = next(weight for name, weight in weights.items() if name.endswith("embed_tokens.weight"))
            weights["lm_head.weight"] = embedding + torch.randn(embedding.shape, generator=seeded(0))
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder, tied and not own

    return make


@pytest.mark.parametrize("name", MODELS)
def test_an_outline_that_is_filled_is_the_loaded_model(name, headed, tmp_path):
    folder, shared_head = headed(name)
    family = family_of(folder, ModelConfig(path=str(folder)))
    loaded, meta_model = family.load(folder, torch.float32), filled(family, folder)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(model, kind)()) for model in (meta_model, loaded))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert ("lm_head.weight" in dict(meta_model.named_parameters())) is not shared_head
    assert all((family.head(model) is model.get_input_embeddings().weight) is shared_head for model in (meta_model, loaded))
    for number, model in enumerate((meta_model, loaded)):
        saved = published(model, family, tmp_path / str(number))
        again = type(model).from_pretrained(saved)
        assert torch.equal(again.lm_head.weight, family.head(model))
        assert again.config.tie_word_embeddings is shared_head


def test_an_embedding_stored_twice_is_tied(models, tmp_path):
    shutil.copytree(made("tiny_llama", models)[0], tmp_path / "twice")
    weights = load_file(tmp_path / "twice" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "twice" / "model.safetensors", metadata={"format": "pt"})
    family = family_of(tmp_path / "twice", ModelConfig(path="twice"))
    for model in (family.load(tmp_path / "twice", torch.float32), family.meta_model(tmp_path / "twice", torch.float32)):
        assert family.head(model) is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    "text",
    [
        '{"eos_token_id": [2, 0], "temperature": 0.6, "top_p": 0.9, "do_sample": false}',  # transformers does not save this
        '{"eos_token_id": [2, 0],\n "do_sample": true, "temperature": 0.6, "of_another_program": 1}',
        None,
    ],
)
@pytest.mark.parametrize("way", ["load", "meta_model"])
def test_the_generation_config_is_saved_as_it_came(way, text, models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(made("tiny_llama", models)[0], folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if text is not None:
        (folder / "generation_config.json").write_text(text)
    family = family_of(folder, ModelConfig(path="model"))
    model = filled(family, folder) if way == "meta_model" else family.load(folder, torch.float32)
    folder = published(model, family, tmp_path / "checkpoint")
    saved = folder / "generation_config.json"
    assert (saved.read_text() if saved.exists() else None) == text
    assert family_of(folder, ModelConfig(path="saved")).stop_token_ids == family.stop_token_ids


def test_a_broken_generation_config_is_named(models, tmp_path):
    shutil.copytree(made("tiny_llama", models)[0], tmp_path / "model")
    for text in ("{", "[]"):
        (tmp_path / "model" / "generation_config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"model\.path: .*generation_config\.json is not a JSON object: .*; restore"):
            family_of(tmp_path / "model", ModelConfig(path="model"))


def test_a_tokenizer_larger_than_the_embedding_is_refused(models, tmp_path):
    shutil.copytree(made("tiny_llama", models)[0], tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    for last, token in ((576, "<extra_a>"), (577, "<extra_b>")):
        tokenizer.add_tokens([token])
        tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
        with pytest.raises(ConfigError, match=rf"up to token {last} \('{token}'\), the model's 576 embedding rows to 575"):
            family_of(tmp_path / "model", ModelConfig(path="model"))


def test_an_embedding_may_have_rows_without_a_token(models, tmp_path):
    folder, family = made("tiny_llama", models)
    model = family.load(folder, torch.float32)
    model.resize_token_embeddings(640)
    model.save_pretrained(tmp_path)
    family.save_processor(tmp_path)
    assert family_of(tmp_path, ModelConfig(path="model")).encode(text_row()).token_ids == family.encode(text_row()).token_ids


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}", "No system role"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_chat_template_that_refuses_a_row_is_named_with_what_it_says(start, said, models, tmp_path):
    shutil.copytree(made("tiny_llama", models)[0], tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(start + template.read_text())
    family = family_of(tmp_path / "model", ModelConfig(path="model"))
    for look in (family.prompt_length, family.encode, family.opening):
        with pytest.raises(ConfigError, match=rf"text: .* chat template does not take .*\(system, user\): .*{said}"):
            look(text_row())


@pytest.mark.parametrize("name", MODELS)
def test_the_opening_is_what_the_template_writes_for_the_assistant(name, models):
    _, family = made(name, models)
    assert family.opening(text_row()) == "<|im_start|>assistant\n"
    assert family.opening(text_row("<|im_start|>assistant\n")) == "<|im_start|>assistant\n"


def test_without_a_chat_template_there_is_no_opening(models, tmp_path):
    shutil.copytree(made("tiny_llama", models)[0], tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    assert family_of(tmp_path / "plain", ModelConfig(path="plain")).opening(text_row("Think. <think>")) == ""


def test_the_prompt_length_asks_for_no_image(models, monkeypatch):
    _, family = made("tiny_qwen2_5_vl", models)
    row = image_row(2)
    drawn = Row(row.id, row.messages, images=Pictures(never, (0, 1), SIZES[:2]))
    assert family.prompt_length(drawn) == family.prompt_length(row)


def never(source):
    raise AssertionError("an image was made")


@pytest.fixture
def resolved(models, backend, tmp_path):
    """A resolved model whose generation prompt opens a tag."""
    shutil.copytree(made("tiny_llama", models)[0], tmp_path / "thinking")
    template = tmp_path / "thinking" / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<think>\n{% endif %}")
    return ResolvedModel(RunConfig.model_validate(settings(tmp_path / "thinking")), backend)


def pair(target: str | None, rejected: str | None = None) -> Row:
    return Row("a:7", text_row().messages, target=target, rejected=rejected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<think>two</think> 2", r"a:7: the {} begins with '<think>', with which the chat template's generation prompt ends"),
        ("two</think> 2<|im_end|>", r"a:7: the {} holds token 2, which ends a response, before its end"),
        (" \n", r"a:7: no {}"),
        (None, r"a:7: no {}"),
    ],
)
def test_a_response_that_no_model_would_write_is_refused(text, said, resolved):
    good = "two</think> 2"
    check_target(pair(good), resolved)
    check_pair(pair(good, "three</think> 3"), resolved)
    with pytest.raises(ConfigError, match=said.format("target")):
        check_target(pair(text), resolved)
    with pytest.raises(ConfigError, match=said.format("preferred response")):
        check_pair(pair(text, good), resolved)
    with pytest.raises(ConfigError, match=said.format("rejected response")):
        check_pair(pair(good, text), resolved)


def test_freezing_everything_leaves_nothing_to_train(models, backend):
    folder = made("tiny_llama", models)[0]
    frozen = {"model": {"path": str(folder), "freeze": ["model"]}}
    resolved = ResolvedModel(RunConfig.model_validate(settings(folder) | frozen), backend)
    with pytest.raises(ConfigError, match=r"model\.freeze: model is every weight: nothing is left to train; name fewer"):
        resolved.trainable(resolved.load(folder))
