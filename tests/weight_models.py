"""Tiny models for the tests of conversions, checkpoints of their training, and what the folders hold."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rlcore import registry
from rlcore.cli.main import main

FAMILIES = ("tiny_llama", "tiny_qwen3", "tiny_qwen2_vl", "tiny_qwen2_5_vl", "tiny_qwen3_vl", "tiny_qwen3_moe")
SMALL = {"hidden_size": 32, "layers": 2, "heads": 4}


def model(folder: Path, family: str, **options) -> Path:
    """A model folder with random weights everywhere, biases and norms too."""
    folder.mkdir(parents=True)
    vision = {"vision_hidden_size": 32, "vision_layers": 2, "vision_heads": 2} if family.endswith("vl") else {}
    experts = {"experts": 3, "expert_size": 16, "tied": False} if family.endswith("moe") else {}
    registry.load("models", family)(folder, **{**SMALL, **vision, **experts, **options})
    random = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(tensor.shape, generator=random) for name, tensor in tensors(folder).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.1}')
    (folder / "merges.txt").write_text("a b\n")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder's safetensors files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_equal(one: Path, other: Path) -> None:
    """Both folders hold the same tensors, bit for bit."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def convert(*words, status: int = 0) -> None:
    assert main(["convert", *map(str, words)]) == status


def refused(capsys, output: Path, *words) -> str:
    """The error of a conversion that ends with status 2 and leaves nothing behind."""
    before = sorted(output.parent.iterdir())
    capsys.readouterr()
    convert(*words, status=2)
    assert sorted(output.parent.iterdir()) == before, "something is left behind"
    return capsys.readouterr().err


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def trained(folder: Path, *jobs: str) -> None:
    """Run `fsdp_checkpoints.py` on two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, str(Path(__file__).with_name("fsdp_checkpoints.py")), str(folder), str(port)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    said = [(folder / f"{rank}.txt").open("w") for rank in range(2)]
    ranks = [subprocess.Popen([*program, str(rank), *jobs], stderr=said[rank], env=one_thread) for rank in range(2)]
    try:
        assert [rank.wait(timeout=280) for rank in ranks] == [0, 0], (folder / "1.txt").read_text()
    finally:
        for rank in ranks:
            rank.kill()
