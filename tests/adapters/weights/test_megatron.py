"""Megatron-Core's torch_dist: both ways through our own reader, and through real megatron-core where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rlcore_adapters.weights import megatron
from weight_models import assert_equal, convert, model, refused, tensors

from rlcore.weights import distributed
from rlcore.weights.architecture import architecture

FAMILIES = ("tiny_llama", "tiny_qwen3", "tiny_qwen3_moe", "tiny_qwen2_5_vl")
SIZES = ("to.tensor_parallel=2", "to.pipeline_parallel=2")
JOBS = {
    "dense": ("tiny_qwen3", {"tied": False}, [(1, 1, 1), (2, 1, 1), (1, 2, 1)]),
    "tied": ("tiny_qwen3", {}, [(2, 1, 1)]),
    "experts": ("tiny_qwen3_moe", {"experts": 4}, [(1, 1, 1), (1, 1, 2), (1, 2, 1)]),
    "vision": ("tiny_qwen2_5_vl", {}, [(1, 1, 1), (2, 1, 1)]),
}
needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None,
    reason="megatron-core is not installed: pip install --no-deps megatron-core==0.16.1",
)
needs_mbridge = pytest.mark.skipif(
    importlib.util.find_spec("mbridge") is None, reason="mbridge is not installed: pip install --no-deps mbridge==0.15.1"
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [(), SIZES], ids=["one", "split"])
def test_round_trips_are_bit_equal(sizes, family, tmp_path):
    base = model(tmp_path / "base", family)
    convert("huggingface", "megatron", "--input", base, "--output", tmp_path / "dist", *sizes)
    convert("megatron", "--input", tmp_path / "dist", "--output", tmp_path / "out", "--base", base)
    assert_equal(tmp_path / "out", base)


def test_stacked_tensors_are_complete_in_torchs_own_reader(tmp_path):
    """Every element is written: a tensor filled with NaN is overwritten by torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp

    base = model(tmp_path / "base", "tiny_qwen3_moe")
    convert("huggingface", "megatron", "--input", base, "--output", tmp_path / "dist", *SIZES)
    folder = tmp_path / "dist" / "release"
    found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {name: torch.full(one.size, float("nan")) for name, one in found.items() if hasattr(one, "size")}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    assert [name for name, tensor in state.items() if tensor.isnan().any()] == []
    hub = tensors(base)
    expert = state["decoder.layers.mlp.experts.experts.linear_fc1.weight"][1, 2]
    parts = [hub[f"model.layers.1.mlp.experts.2.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(expert, torch.cat(parts))
    q, k, v = (hub[f"model.layers.0.self_attn.{name}_proj.weight"].chunk(2) for name in "qkv")
    grouped = torch.cat([q[0], k[0], v[0], q[1], k[1], v[1]])
    assert torch.equal(state["decoder.layers.self_attention.linear_qkv.weight"][0], grouped)


def test_a_checkpoint_is_as_large_as_its_tensors(tmp_path):
    """Each chunk is stored once, without the rest of the tensor that it was cut from."""
    base = model(tmp_path / "base", "tiny_llama", hidden_size=256, layers=2, tied=False)
    convert("huggingface", "megatron", "--input", base, "--output", tmp_path / "dist", *SIZES)
    size = sum(file.stat().st_size for file in tmp_path.joinpath("dist", "release").glob("*.distcp"))
    whole = sum(tensor.nbytes for tensor in tensors(base).values())
    assert whole < size < 1.1 * whole


def test_sizes_that_do_not_divide_and_foreign_folders_are_refused(tmp_path, capsys):
    base = model(tmp_path / "base", "tiny_qwen3_moe")

    def said(*words):
        return refused(capsys, tmp_path / "out", *words, "--output", tmp_path / "out")

    there = ("huggingface", "megatron", "--input", base)
    assert "to.tensor_parallel: 4 does not divide the model's query groups, 2" in said(*there, "to.tensor_parallel=4")
    assert "to.expert_parallel: 2 does not divide the model's 3 experts" in said(*there, "to.expert_parallel=2")
    assert "2 layers do not make 4 stages" in said(*there, "to.pipeline_parallel=4")
    assert "to.tensor_paralel: no such setting; did you mean 'tensor_parallel'?" in said(*there, "to.tensor_paralel=2")
    assert "metadata.json: not a distributed checkpoint of Megatron-Core" in said("megatron", "--input", base, "--base", base)
    convert(*there, "--output", tmp_path / "dist")
    other = model(tmp_path / "other", "tiny_qwen3")
    assert "6 missing: model.layers.0.mlp." in said("megatron", "--input", tmp_path / "dist", "--base", other)
    file = sorted((tmp_path / "dist" / "release").glob("*.distcp"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file.name}: truncated" in said("megatron", "--input", tmp_path / "dist", "--base", base)
    vision = model(tmp_path / "vision", "tiny_qwen3_vl")
    assert "are not in the table of names" in said("huggingface", "megatron", "--input", vision)


def test_uneven_stages_take_first_and_last_sizes():
    assert megatron._stages(36, 4, None, None) == [9, 18, 27, 36]
    assert megatron._stages(8, 3, 2, None) == [2, 5, 8]
    assert megatron._stages(8, 3, 1, 3) == [1, 5, 8]


@needs_megatron
def test_real_megatron_loads_runs_and_saves_what_was_converted(tmp_path):
    """No parameter keeps its NaN; log-probabilities are transformers'; what Megatron saves converts back bit-equal."""
    jobs = []
    for name, (family, options, sizes) in JOBS.items():
        base = model(tmp_path / f"base-{name}", family, **options)
        convert("huggingface", "megatron", "--input", base, "--output", tmp_path / name, "to.tensor_parallel=2")
        jobs += [f"{name}={base}={'='.join(map(str, one))}" for one in sizes]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, str(Path(__file__).parents[2] / "megatron_models.py"), str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    said = [(tmp_path / f"rank{rank}.txt").open("w+") for rank in range(2)]
    ranks = [
        subprocess.Popen([*program, str(rank), str(tmp_path), *jobs], stdout=said[rank], stderr=said[rank], env=environment)
        for rank in range(2)
    ]
    try:
        ended = [rank.wait(timeout=280) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    texts = [file.seek(0) or file.read() for file in said]
    assert ended == [0, 0], texts[0][-3000:]
    results = [json.loads(line) for text in texts for line in text.splitlines() if line.startswith('{"job"')]
    assert len(results) == 2 * len(jobs)
    assert [one for one in results if one["unread"]] == []
    assert [one for one in results if one["error"] is not None and one["error"] > 1e-4] == []
    for name, (_, _, sizes) in JOBS.items():
        for tensor, pipeline, expert in sizes:
            saved = tmp_path / f"{name}-tp{tensor}-pp{pipeline}-ep{expert}"
            out = saved.with_name(f"back-{saved.name}")
            convert("megatron", "--input", saved, "--output", out, "--base", tmp_path / f"base-{name}")
            assert_equal(out, tmp_path / f"base-{name}")


@needs_mbridge
@pytest.mark.parametrize("family", ["tiny_qwen3", "tiny_qwen3_moe", "tiny_qwen2_5_vl"])
def test_tables_are_those_of_mbridge(family, tmp_path):
    """What was written, tensor by tensor. mbridge names experts as grouped GEMM does: linear_fc1.weight5."""
    importlib.import_module("mbridge")  # registers its models
    from mbridge.core.bridge import _MODEL_REGISTRY

    base = model(tmp_path / "base", family, tied=False)
    known, hub = architecture(base), tensors(base)
    bridge = object.__new__(_MODEL_REGISTRY[known.config.model_type])
    flat = {**known.text_config.to_dict(), "vision_config": getattr(known.config, "vision_config", None)}  # as before 4.52
    bridge.hf_config, bridge.make_vocab_size_divisible_by = SimpleNamespace(**flat), None
    convert("huggingface", "megatron", "--input", base, "--output", tmp_path / "dist", "to.tensor_parallel=2")
    stacked, chunks = distributed.open_folder(tmp_path / "dist" / "release")
    written = megatron._layered(tmp_path / "dist" / "release", stacked, chunks)
    for rule in megatron.applied(megatron._rules(known), hub, "mbridge"):
        theirs = rule.other
        if ".experts." in theirs:
            head, _, rest = theirs.partition(".experts.")
            expert, kind, leaf = rest.split(".")
            theirs = f"{head}.experts.{kind}.{leaf}{expert}"
        assert tuple(bridge._weight_name_mapping_mcore_to_hf(theirs)) == rule.hub
        parts = [hub[name] for name in rule.hub]
        assert torch.equal(bridge._weight_to_mcore_format(theirs, parts), written.read(rule.other))
        split = bridge._weight_to_hf_format(theirs, rule.layout.join(parts))[1]
        assert all(torch.equal(one, other) for one, other in zip(split, parts, strict=True))
