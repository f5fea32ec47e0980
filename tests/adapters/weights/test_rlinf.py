"""Checkpoints that FSDP2 saved on two ranks as RLinf does, through its own converter's arguments."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import load_file
from weight_models import assert_equal, convert, copied, refused, tensors

PLACES = ("", "actor", "actor/dcp_checkpoint", "actor/model_state_dict/full_weights.pt")


def words(bases, checkpoint, output, *more, base="vision"):
    places = (f"convertor.ckpt_path={checkpoint}", f"convertor.save_path={output}", f"model.model_path={bases / base}")
    return ("rlinf", *places, *more)


@pytest.mark.parametrize("place", PLACES)
def test_a_full_state_dict_and_a_distributed_one_become_the_model(place, bases, checkpoints, tmp_path):
    convert(*words(bases, checkpoints / "rlinf_vision" / place, tmp_path / "out", "model.model_type=qwen2.5_vl"))
    assert_equal(tmp_path / "out", bases / "vision")
    assert (tmp_path / "out" / "merges.txt").read_text() == "a b\n"


@pytest.mark.parametrize("place", PLACES[2:])
def test_fused_experts_become_single_ones(place, bases, checkpoints, tmp_path):
    convert(*words(bases, checkpoints / "rlinf_experts" / place, tmp_path / "out", base="experts"))
    assert_equal(tmp_path / "out", bases / "experts")


def peft_model(bases):
    """The model that was saved, by peft itself."""
    import peft
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(3)
    settings = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(bases / "vision", dtype=torch.float32), settings)


@pytest.mark.parametrize("place", PLACES[2:])
def test_lora_is_merged_as_peft_merges_it(place, bases, checkpoints, tmp_path):
    lora = ("model.is_lora=True", "convertor.merge_lora_weighs=True")
    convert(*words(bases, checkpoints / "rlinf_lora" / place, tmp_path / "out", *lora))
    theirs = peft_model(bases).merge_and_unload()
    theirs.generation_config.temperature = None  # transformers refuses to save the one that the folder has
    theirs.save_pretrained(tmp_path / "peft")
    written, expected = tensors(tmp_path / "out"), tensors(tmp_path / "peft")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-6, atol=1e-6)
    base = tensors(bases / "vision")
    changed = {name for name, tensor in written.items() if not torch.equal(tensor, base[name])}
    assert changed == {name for name in base if name.endswith(("q_proj.weight", "down_proj.weight"))}


def test_lora_is_kept_apart_as_an_adapter_that_peft_loads(bases, checkpoints, tmp_path):
    lora = ("model.is_lora=True", "convertor.merge_lora_weighs=False")
    convert(*words(bases, checkpoints / "rlinf_lora", tmp_path / "out", *lora))
    import peft
    from transformers import AutoModelForImageTextToText

    plain = AutoModelForImageTextToText.from_pretrained(bases / "vision", dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "out").state_dict()
    expected = peft_model(bases).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    convert("peft", "huggingface", "--input", tmp_path / "out", "--output", tmp_path / "merged")
    convert(*words(bases, checkpoints / "rlinf_lora", tmp_path / "direct"))
    assert_equal(tmp_path / "merged", tmp_path / "direct")


def test_what_contradicts_the_checkpoint_is_refused(bases, checkpoints, tmp_path, capsys):
    def said(*more, name="rlinf_vision"):
        return refused(capsys, tmp_path / "out", *words(bases, checkpoints / name, tmp_path / "out", *more))

    assert "model.model_type: qwen3_vl, but" in said("model.model_type=qwen3_vl")
    assert "model.is_lora: True, but" in said("model.is_lora=True")
    assert "LoRA of rank [4], not [8]" in said("model.lora_rank=8", name="rlinf_lora")
    assert "no such argument; did you mean 'model.model_path'" in said("model.model_pat=1")


def test_damaged_distributed_checkpoints_are_named(bases, checkpoints, tmp_path, capsys):
    folder = copied(checkpoints / "rlinf_vision" / "actor" / "dcp_checkpoint", tmp_path / "checkpoint")
    file = folder / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "__1_0.distcp: truncated" in refused(capsys, tmp_path / "out", *words(bases, folder, tmp_path / "out"))
    file.unlink()
    assert "__1_0.distcp: missing" in refused(capsys, tmp_path / "out", *words(bases, folder, tmp_path / "out"))


class Malicious:
    def __reduce__(self):
        return (print, ("this ran",))


def test_metadata_that_holds_anything_else_is_refused_and_not_run(bases, checkpoints, tmp_path, capsys):
    folder = copied(checkpoints / "rlinf_vision" / "actor" / "dcp_checkpoint", tmp_path / "checkpoint")
    (folder / ".metadata").write_bytes(pickle.dumps(Malicious()))
    said = refused(capsys, tmp_path / "out", *words(bases, folder, tmp_path / "out"))
    assert ".metadata: refused: its pickle holds more than a checkpoint's metadata: it holds builtins.print" in said


def test_adapters_have_the_scale_of_their_options(bases, checkpoints, tmp_path):
    """alpha, and rank-stabilized LoRA (arXiv 2312.03732)."""
    import json

    convert(*words(bases, checkpoints / "rlinf_lora", tmp_path / "out"), "to=peft")
    options = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps({**options, "lora_alpha": 6, "use_rslora": True}))
    convert("peft", "--input", tmp_path / "out", "--output", tmp_path / "merged")
    factors, base = load_file(tmp_path / "out" / "adapter_model.safetensors"), tensors(bases / "vision")
    layer = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    change = factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"] * 6 / 2
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(tensors(tmp_path / "merged")[name], base[name] + change)
