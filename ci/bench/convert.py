"""Host memory of `rlcore convert`, from every format and to every format: the peak above what the process had before, compared
with two of the largest files. A Qwen2.5-VL with random weights; each conversion runs in a process of its own."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import stack

stack.start()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.distributed.checkpoint.state_dict_saver import save  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Shard  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from rlcore import registry  # noqa: E402
from rlcore.cli.main import main as main_of_rlcore  # noqa: E402
from rlcore.weights.convert import Conversion, convert  # noqa: E402

MB = 10**6
LORA = re.compile(r"language_model\.layers\.\d+\.(self_attn\.q_proj|mlp\.down_proj)\.weight$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12, help="36 MB each; an even number")
    parser.add_argument("--shard-mb", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        model(folder / "small", 2, hidden_size=64)
        base = model(folder / "base", options.layers)
        sources(base, folder, options.layers, options.shard_mb)
        size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        print(f"{size / MB:.0f} MB of weights; the limit is {2 * options.shard_mb} MB")
        print("| conversion | peak, MB | s |\n| --- | --- | --- |")
        for name, words in conversions(folder, options.layers).items():
            peak, seconds = measured([*words, f"--shard-size={options.shard_mb / 1000}"], folder)
            print(f"| {name} | {peak / MB:.0f} | {seconds:.1f} |", flush=True)


def conversions(folder: Path, layers: int) -> dict[str, list[str]]:
    split = ["to.tensor_parallel=2", "to.pipeline_parallel=2"]
    one = [f"to.llm_pp_layers=[{layers}]", "to.vit_pp_layers=[2]"]
    source = f"--input={folder / 'huggingface'}"
    targets = {
        "huggingface -> huggingface": [], "huggingface -> huggingface, bfloat16": ["--dtype=bfloat16"],
        "huggingface -> rlcore": ["rlcore"], "huggingface -> megatron": ["megatron", *split],
        "huggingface -> mindspeed, one file": ["mindspeed", *one],
        "huggingface -> mindspeed, two ranks": ["mindspeed", *one, "to.tp_size=2"],
    }  # fmt: skip
    found = {name: ["huggingface", *words, source] for name, words in targets.items()}
    for name in ("rlcore", "peft", "chatlearn", "rlinf, full", "rlinf, dcp", "rlinf, lora", "megatron", "mindspeed"):
        words = [name.partition(",")[0], f"--input={folder / name}", f"--base={folder / 'base'}"]
        found[f"{name} -> huggingface"] = [*words, *(["from.iter=1"] if name == "chatlearn" else [])]
    again = ["mindspeed", "mindspeed", f"--input={folder / 'mindspeed'}", *one, "to.tp_size=2"]
    return {**found, "mindspeed -> mindspeed, two ranks": again}


def model(folder: Path, layers: int, hidden_size: int = 1024) -> Path:
    folder.mkdir()
    registry.load("models", "tiny_qwen2_5_vl")(folder, hidden_size=hidden_size, layers=layers, heads=8, vision_layers=2)
    return folder


def sources(base: Path, folder: Path, layers: int, shard_mb: int) -> None:
    """The same weights in every format that can be read."""
    from transformers import AutoModelForImageTextToText

    state = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).state_dict()
    chatlearn(state, folder / "chatlearn" / "1", ranks=layers)
    factors = lora(state)
    wrapped = {f"base_model.model.{wrapped_name(name)}": tensor for name, tensor in state.items()}
    for name, whole in {"rlinf, full": state, "rlinf, lora": {**wrapped, **factors}}.items():
        (folder / name / "model_state_dict").mkdir(parents=True)
        torch.save(whole, folder / name / "model_state_dict" / "full_weights.pt")
    saved: dict[str, Any] = {"fsdp_checkpoint": {"model": state}}
    save(saved, checkpoint_id=folder / "rlinf, dcp" / "dcp_checkpoint", no_dist=True)
    (folder / "peft").mkdir()
    save_file(factors, folder / "peft" / "adapter_model.safetensors")
    (folder / "peft" / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 8}')
    writing = {"megatron": {"tensor_parallel": 2}, "mindspeed": {"llm_pp_layers": [layers], "vit_pp_layers": [2]}}
    for name in ("huggingface", "rlcore", "megatron", "mindspeed"):
        options = writing.get(name, {})
        convert(Conversion("huggingface", name, base, folder / name, shard_bytes=shard_mb * MB, writing=options))


def chatlearn(state: dict[str, Any], folder: Path, ranks: int) -> None:
    """Each rank's shards, saved one rank after another."""
    folder.mkdir(parents=True)
    for rank in range(ranks):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        mesh = init_device_mesh("cpu", (ranks,))
        shards = {name: shard(tensor, mesh, rank, ranks) for name, tensor in state.items()}
        torch.save(shards, folder / f"model_world_size_{ranks}_rank_{rank}.pt")
        dist.destroy_process_group()


def shard(tensor: torch.Tensor, mesh: Any, rank: int, ranks: int) -> DTensor:
    chunks = tensor.chunk(ranks)
    local = chunks[rank].clone() if rank < len(chunks) else tensor[:0]
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


def lora(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    layers = {name.removesuffix(".weight"): tensor.shape for name, tensor in state.items() if LORA.search(name)}
    shapes = {"A": lambda rows, columns: (8, columns), "B": lambda rows, columns: (rows, 8)}
    return {
        f"base_model.model.{layer}.lora_{part}.weight": torch.randn(shape(*layers[layer]))
        for layer in layers for part, shape in shapes.items()
    }  # fmt: skip


def wrapped_name(name: str) -> str:
    return name.replace(".weight", ".base_layer.weight") if LORA.search(name) else name


def measured(words: list[str], folder: Path) -> tuple[int, float]:
    """Bytes that a process needed above those before, and seconds."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        program = [sys.executable, str(Path(__file__)), "--one", str(folder / "small"), work, *words]
        peak, seconds = subprocess.check_output(program, text=True).split()[-2:]
    return int(peak), float(seconds)


def one(small: str, work: str, *words: str) -> None:
    main_of_rlcore(["convert", "huggingface", f"--input={small}", f"--output={work}/warm-up"])  # what is imported once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
    before, start = resident("VmRSS"), time.perf_counter()
    assert main_of_rlcore(["convert", *words, f"--output={work}/out"]) == 0
    print(resident("VmHWM") - before, time.perf_counter() - start)


def resident(key: str) -> int:
    """Bytes of this process's memory. Weights are read, not mapped: what grows is anonymous."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, key
    return int(found[1]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])
    else:
        main()
