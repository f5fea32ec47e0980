"""Checkpoints that FSDP2 saved on two ranks, through ChatLearn's own command line."""

from __future__ import annotations

import json
import pickle
import re
import shutil

import pytest
import torch
from weight_models import assert_equal, convert, copied, model, refused, tensors

from rlcore.weights.pickles import assembled, read_stored, stored


def words(bases, checkpoints, output, name="text", base="text", step=7, groupgemm=0):
    """The arguments of ChatLearn's offline_ckpt_converter.py, as its tutorial gives them."""
    return (
        "chatlearn", "--hf_dir", bases / base, "--ckpt_dir", checkpoints / f"chatlearn_{name}", "--save_dir", output,
        "--iter", step, "--groupgemm", groupgemm,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "base", "groupgemm"),
    [("text",) * 2 + (0,), ("vision",) * 2 + (0,), ("experts",) * 2 + (0,), ("grouped", "experts", 1), ("second", "vision", 0)],
)
def test_shards_become_the_model_they_came_from(name, base, groupgemm, bases, checkpoints, tmp_path):
    """Text, tied and renamed vision, experts (three over two ranks), grouped experts, shards of the second dimension."""
    convert(*words(bases, checkpoints, tmp_path / "out", name, base, groupgemm=groupgemm))
    assert_equal(tmp_path / "out", bases / base)
    for file in bases.joinpath(base).iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_every_placement_is_put_together(checkpoints):
    value = torch.arange(7 * 5 * 3, dtype=torch.float32).reshape(7, 5, 3)
    files = [checkpoints / "placements" / f"{rank}.pt" for rank in range(2)]
    ranks = [stored(path) for path in files]
    names = ("tiny", "first", "second", "last", "replica", "hybrid", "twice")
    for name, expected in zip(names, [value[:1]] + [value] * 6, strict=True):
        pieces = [read_stored(path, entries[name], name) for path, entries in zip(files, ranks, strict=True)]
        assert torch.equal(assembled(pieces, ranks[0][name]), expected), name
    assert torch.equal(read_stored(files[0], ranks[0]["plain"], "plain"), value.bfloat16())
    assert torch.equal(read_stored(files[0], ranks[0]["scalar"], "scalar"), value[0, 0, 1])
    assert torch.equal(read_stored(files[0], ranks[0]["view"], "view"), value.transpose(0, 2)[1:])


def test_a_missing_rank_is_named(bases, checkpoints, tmp_path, capsys):
    copied(checkpoints / "chatlearn_text", tmp_path / "chatlearn_text")
    (tmp_path / "chatlearn_text" / "7" / "model_world_size_2_rank_1.pt").unlink()
    assert "model_world_size_2_rank_1.pt: missing (1 of 2 ranks' files)" in refused(
        capsys, tmp_path / "out", *words(bases, tmp_path, tmp_path / "out")
    )


def test_a_stale_file_of_another_run_is_refused(bases, checkpoints, tmp_path, capsys):
    folder = copied(checkpoints / "chatlearn_text", tmp_path / "chatlearn_text") / "7"
    shutil.copy(folder / "model_world_size_2_rank_0.pt", folder / "model_world_size_1_rank_0.pt")
    said = refused(capsys, tmp_path / "out", *words(bases, tmp_path, tmp_path / "out"))
    assert "files of 2 runs (world sizes [1, 2])" in said


def test_another_iteration_lists_those_there_are(bases, checkpoints, tmp_path, capsys):
    said = refused(capsys, tmp_path / "out", *words(bases, checkpoints, tmp_path / "out", step=8))
    assert "--iter" in said and "chatlearn_text has 7" in said


def test_another_architecture_lists_the_tensors(bases, checkpoints, tmp_path, capsys):
    said = refused(capsys, tmp_path / "out", *words(bases, checkpoints, tmp_path / "out", "text", "experts"))
    assert re.search(r"20 missing: .*mlp\.(experts|gate)", said) and re.search(r"6 left over: .*mlp\.(down|up|gate)_proj", said)


def test_a_misshapen_tensor_is_named_with_both_shapes(checkpoints, tmp_path, capsys):
    model(tmp_path / "bases" / "text", "tiny_qwen3", tied=False, hidden_size=64)
    said = refused(capsys, tmp_path / "out", *words(tmp_path / "bases", checkpoints, tmp_path / "out"))
    assert re.search(r"25 misshapen: .* is \[.*\], not \[", said)


def test_grouped_experts_need_the_flag(bases, checkpoints, tmp_path, capsys):
    said = refused(capsys, tmp_path / "out", *words(bases, checkpoints, tmp_path / "out", "grouped", "experts"))
    assert re.search(r"6 left over: .*group_mlp\.", said)
    said = refused(capsys, tmp_path / "out", *words(bases, checkpoints, tmp_path / "out", groupgemm=1))
    assert "--groupgemm" in said and "has no num_experts" in said


def test_a_truncated_file_is_named(bases, checkpoints, tmp_path, capsys):
    copied(checkpoints / "chatlearn_text", tmp_path / "chatlearn_text")
    file = tmp_path / "chatlearn_text" / "7" / "model_world_size_2_rank_1.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    said = refused(capsys, tmp_path / "out", *words(bases, tmp_path, tmp_path / "out"))
    assert "model_world_size_2_rank_1.pt: not a whole file of torch.save" in said


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_not_run(legacy, bases, checkpoints, tmp_path, capsys):
    copied(checkpoints / "chatlearn_text", tmp_path / "chatlearn_text")
    file, mark = tmp_path / "chatlearn_text" / "7" / "model_world_size_2_rank_1.pt", tmp_path / "ran"
    if legacy:
        file.write_bytes(pickle.dumps({"a": Malicious(mark)}))
    else:
        torch.save({"a": Malicious(mark)}, file)
    said = refused(capsys, tmp_path / "out", *words(bases, tmp_path, tmp_path / "out"))
    assert "model_world_size_2_rank_1.pt: refused: its pickle holds more than tensors" in said and not mark.exists()


def test_ranks_of_two_models_are_refused(bases, checkpoints, tmp_path, capsys):
    folder = copied(checkpoints / "chatlearn_text", tmp_path / "chatlearn_text") / "7"
    shutil.copy(checkpoints / "chatlearn_vision" / "7" / "model_world_size_2_rank_1.pt", folder)
    said = refused(capsys, tmp_path / "out", *words(bases, tmp_path, tmp_path / "out"))
    assert "model_world_size_2_rank_1.pt: " in said and "do they belong together?" in said


def test_weights_are_cast_when_asked(bases, checkpoints, tmp_path):
    convert(*words(bases, checkpoints, tmp_path / "out"), "--dtype", "bfloat16")
    written, base = tensors(tmp_path / "out"), tensors(bases / "text")
    assert all(torch.equal(written[name], base[name].bfloat16()) for name in base)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
