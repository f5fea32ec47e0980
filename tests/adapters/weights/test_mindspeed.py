"""MindSpeed-MM's layout of Qwen2.5-VL: both ways, split again, the tower alone, and what is refused."""

from __future__ import annotations

import argparse
import re
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file
from weight_models import assert_equal, convert, copied, model, refused, tensors

LAYOUTS = {
    "one": ("to.llm_pp_layers=[[2]]", "to.vit_pp_layers=[[2]]"),
    "tensor": ("to.llm_pp_layers=[2]", "to.vit_pp_layers=[2]", "to.tp_size=2"),
    "pipeline": ("to.llm_pp_layers=[[1, 1, 0]]", "to.vit_pp_layers=[[0, 1, 1]]"),
    "both": ("to.llm_pp_layers=[[0, 2]]", "to.vit_pp_layers=[[2, 0]]", "to.tp_size=2"),
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    return model(tmp_path_factory.mktemp("base") / "vision", "tiny_qwen2_5_vl", tied=request.param)


def loaded(file):
    return torch.load(file, weights_only=True)["model"]


def assert_same_ranks(one, other):
    files = [sorted(file.relative_to(folder) for file in folder.rglob("*.pt")) for folder in (one, other)]
    assert files[0] == files[1] and files[0]
    for first, second in ((loaded(one / file), loaded(other / file)) for file in files[0]):
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trips_are_bit_equal(layout, base, tmp_path):
    convert("huggingface", "mindspeed", "--input", base, "--output", tmp_path / "mm", *LAYOUTS[layout])
    convert("mindspeed", "--input", tmp_path / "mm", "--output", tmp_path / "out", "--base", base)
    assert_equal(tmp_path / "out", base)


def test_a_checkpoint_is_split_again(base, tmp_path):
    convert("huggingface", "mindspeed", "--input", base, "--output", tmp_path / "one", *LAYOUTS["both"])
    again = ("mindspeed", "mindspeed", "--input", tmp_path / "one", "--output", tmp_path / "two")
    convert(*again, "--base", base, *LAYOUTS["tensor"])
    convert("huggingface", "mindspeed", "--input", base, "--output", tmp_path / "direct", *LAYOUTS["tensor"])
    assert_same_ranks(tmp_path / "two", tmp_path / "direct")


def test_ranks_hold_what_mindspeed_gives_them(base, tmp_path):
    """Against the formulas of MindSpeed-MM's operators, written out by head and by rank."""
    convert("huggingface", "mindspeed", "--input", base, "--output", tmp_path / "mm", *LAYOUTS["both"])
    hub = tensors(base)
    second = loaded(tmp_path / "mm" / "release" / "mp_rank_01_001" / "model_optim_rng.pt")
    text, q, k, v = "text_decoder.decoder.layers.1.", *(hub[f"model.layers.1.self_attn.{n}_proj.weight"] for n in "qkv")
    assert torch.equal(second[f"{text}self_attention.linear_qkv.weight"], torch.cat([q[16:], k[8:], v[8:]]))  # the second group
    gate, up = (hub[f"model.layers.1.mlp.{n}_proj.weight"] for n in ("gate", "up"))
    assert torch.equal(second[f"{text}mlp.linear_fc1.weight"], torch.cat([gate[32:], up[32:]]))
    assert torch.equal(second[f"{text}mlp.linear_fc2.weight"], hub["model.layers.1.mlp.down_proj.weight"][:, 32:])
    first = loaded(tmp_path / "mm" / "release" / "mp_rank_00_000" / "model_optim_rng.pt")
    fused = hub["visual.blocks.0.attn.qkv.bias"].reshape(3, 2, 16)
    assert torch.equal(first["image_encoder.encoder.blocks.layers.0.self_attention.linear_qkv.bias"], fused[:, 0].flatten())
    head = hub.get("lm_head.weight", hub["model.embed_tokens.weight"])
    assert torch.equal(second["text_decoder.output_layer.weight"], head[288:])
    kinds = Counter(name.partition(".")[0] for name in [*first, *second])
    assert set(kinds) == {"image_encoder", "text_decoder"} and not any(name.startswith("image") for name in second)


def test_the_tower_alone_has_its_own_names_and_is_no_model(base, tmp_path, capsys):
    words = ("huggingface", "mindspeed", "--input", base, "--output", tmp_path / "vit")
    convert(*words, "to.vit_pp_layers=[[2]]", "to.vit_only=true")
    names = loaded(tmp_path / "vit" / "release" / "mp_rank_00" / "model_optim_rng.pt")
    assert all(name.startswith("image_encoder.") for name in names)
    assert len(names) == sum(rule_of(name) for name in tensors(base))
    back = ("mindspeed", "--input", tmp_path / "vit", "--output", tmp_path / "out", "--base", base)
    said = refused(capsys, tmp_path / "out", *back)
    assert "missing: " in said and "model.embed_tokens.weight" in said


def rule_of(name):
    """1 for the first of the hub's tensors that make one of MindSpeed's."""
    return name.startswith("visual.") and ".up_proj." not in name


def test_other_states_of_a_run_are_skipped_and_its_classes_never_imported(base, tmp_path):
    convert("huggingface", "mindspeed", "--input", base, "--output", tmp_path / "mm", *LAYOUTS["one"])
    file = tmp_path / "mm" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    saved = torch.load(file, weights_only=True)
    saved["model"]["text_decoder.output_layer._extra_state"] = None
    torch.save({**saved, "args": argparse.Namespace(tp=1), "iteration": 3}, file)
    convert("mindspeed", "--input", tmp_path / "mm", "--output", tmp_path / "out", "--base", base)
    assert_equal(tmp_path / "out", base)


def test_bad_layouts_and_files_are_refused(base, tmp_path, capsys):
    def said(*words):
        return refused(capsys, tmp_path / "out", *words, "--output", tmp_path / "out")

    there = ("huggingface", "mindspeed", "--input", base)
    assert "to.llm_pp_layers: [3] are 3 layers, the model has 2" in said(*there, "to.llm_pp_layers=[3]", "to.vit_pp_layers=[2]")
    assert "of different lengths" in said(*there, "to.llm_pp_layers=[1,1]", "to.vit_pp_layers=[2]")
    assert "virtual stages" in said(*there, "to.llm_pp_layers=[[1],[1]]", "to.vit_pp_layers=[2]")
    assert "to.tp_size: 4 does not divide" in said(*there, *LAYOUTS["one"], "to.tp_size=4")
    assert "to.llm_pp_layers: missing" in said(*there, "to.vit_pp_layers=[2]")
    convert(*there, "--output", tmp_path / "mm", *LAYOUTS["tensor"])
    back = ("mindspeed", "--input", tmp_path / "mm", "--base", base)
    (tmp_path / "mm" / "release" / "mp_rank_00" / "model_optim_rng.pt").unlink()
    assert "mp_rank_00/model_optim_rng.pt: missing (1 of 2" in said(*back)
    text = model(tmp_path / "text", "tiny_qwen3")
    assert "MindSpeed-MM holds vision-language models" in said("huggingface", "mindspeed", "--input", text, *LAYOUTS["one"])
    other = copied(base, tmp_path / "other")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"intermediate_size": 64', '"intermediate_size": 32'))
    convert(*there, "--output", tmp_path / "whole", *LAYOUTS["one"])
    assert "have other shapes than" in said("mindspeed", "--input", tmp_path / "whole", "--base", other)


def sizes(of, llm, vit, tp):
    return (f"--cfg.{of}.llm_pp_layers", llm, f"--cfg.{of}.vit_pp_layers", vit, f"--cfg.{of}.tp_size", tp)


def test_the_words_of_mm_convert_do_as_ours(base, tmp_path):
    """hf_to_mm, resplit (which names no Hugging Face folder) and mm_to_hf, as MindSpeed-MM's pages write them."""
    command = ("mindspeed", "Qwen2_5_VLConverter")
    folders = ("--cfg.mm_dir", tmp_path / "mm", "--cfg.hf_config.hf_dir", base)
    convert(*command, "hf_to_mm", *folders, *sizes("parallel_config", "[[0,2]]", "[[2,0]]", 2))
    convert("huggingface", "mindspeed", "--input", base, "--output", tmp_path / "ours", *LAYOUTS["both"])
    assert_same_ranks(tmp_path / "mm", tmp_path / "ours")

    source = ("--cfg.source_dir", tmp_path / "mm", *sizes("source_parallel_config", "[0,2]", "[2,0]", 2))
    target = ("--cfg.target_dir", tmp_path / "again", *sizes("target_parallel_config", "[2]", "[2]", 1))
    convert(*command, "resplit", *source, *target)
    words = ("--input", tmp_path / "mm", "--output", tmp_path / "ours-again", "--base", base, *LAYOUTS["one"])
    convert("mindspeed", "mindspeed", *words)
    assert_same_ranks(tmp_path / "again", tmp_path / "ours-again")

    folders = ("--cfg.save_hf_dir", tmp_path / "hf", "--cfg.mm_dir", tmp_path / "again", "--cfg.hf_config.hf_dir", base)
    convert(*command, "mm_to_hf", *folders, *sizes("parallel_config", "[2]", "[2]", 1))
    assert_equal(tmp_path / "hf", base)


def test_a_tied_model_gets_its_head_when_it_is_split_into_stages(tmp_path):
    base = model(tmp_path / "base", "tiny_qwen2_5_vl")
    convert("huggingface", "mindspeed", "--input", base, "--output", tmp_path / "one", *LAYOUTS["one"])
    convert("huggingface", "mindspeed", "--input", base, "--output", tmp_path / "direct", *LAYOUTS["both"])
    convert("mindspeed", "mindspeed", "--input", tmp_path / "one", "--output", tmp_path / "two", *LAYOUTS["both"])
    assert_same_ranks(tmp_path / "two", tmp_path / "direct")


def test_a_head_of_its_own_is_kept_though_it_equals_the_embedding(tmp_path):
    base = model(tmp_path / "base", "tiny_qwen2_5_vl", tied=False)
    held = tensors(base)
    save_file(held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    convert("huggingface", "mindspeed", "--input", base, "--output", tmp_path / "mm", *LAYOUTS["one"])
    assert "text_decoder.output_layer.weight" in loaded(tmp_path / "mm" / "release" / "mp_rank_00" / "model_optim_rng.pt")


def test_sizes_that_are_not_the_checkpoints_are_refused(base, tmp_path, capsys):
    convert("huggingface", "mindspeed", "--input", base, "--output", tmp_path / "mm", *LAYOUTS["both"])

    def said(llm, vit, tp, command="mm_to_hf", *more):
        folders = ("--cfg.save_hf_dir", tmp_path / "out", "--cfg.mm_dir", tmp_path / "mm", "--cfg.hf_config.hf_dir", base)
        words = ("mindspeed", "Qwen2_5_VLConverter", command, *folders, *sizes("parallel_config", llm, vit, tp), *more)
        return refused(capsys, tmp_path / "out", *words)

    assert re.search("from.tp_size: 4, but .* has files of 2 tensor parallel ranks", said("[0,2]", "[2,0]", 4))
    assert "from.llm_pp_layers: [1, 1], but the stages in" in said("[1,1]", "[2,0]", 2)
    assert "from.vit_pp_layers: [2], but" in said("[0,2]", "[2]", 2)
    assert "did you mean 'Qwen2_5_VLConverter mm_to_hf'" in said("[0,2]", "[2,0]", 2, "mm_to_h")
    wrong = said("[0,2]", "[2,0]", 2, "mm_to_hf", "--cfg.mm_dirs", "x")
    assert "cfg.mm_dirs: no such argument; did you mean 'cfg.mm_dir'" in wrong


def changed(file, change):
    saved = torch.load(file, weights_only=True)
    change(saved["model"])
    torch.save(saved, file)


def test_what_is_missing_is_named_where_no_base_model_tells_it(base, tmp_path, capsys):
    convert("huggingface", "mindspeed", "--input", base, "--output", tmp_path / "mm", *LAYOUTS["tensor"])
    norm = "text_decoder.decoder.layers.1.input_layernorm.weight"

    def said(*ranks, change, to=LAYOUTS["one"]):
        checkpoint = copied(tmp_path / "mm", tmp_path / f"copy-{len(list(tmp_path.iterdir()))}")
        for rank in ranks:
            changed(checkpoint / "release" / f"mp_rank_{rank}" / "model_optim_rng.pt", change)
        words = ("mindspeed", "mindspeed", "--input", checkpoint, "--output", tmp_path / "out", *to)
        return refused(capsys, tmp_path / "out", *words)

    assert f"1 tensors are missing: {norm}" in said("00", "01", change=lambda held: held.pop(norm))
    assert f"mp_rank_01/model_optim_rng.pt: {norm} is in only one of it and" in said("01", change=lambda held: held.pop(norm))
    added = said("00", "01", change=lambda held: held.update({"text_decoder.other": torch.ones(2)}))
    assert "1 tensors are not in the table of names: text_decoder.other" in added
    assert "to.tp_size: 3 ranks cannot share the" in said(change=None, to=(*LAYOUTS["one"], "to.tp_size=3"))
