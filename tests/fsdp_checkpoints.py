"""Checkpoints as ChatLearn and RLinf save them: real FSDP2 over gloo. FOLDER PORT RANK JOB... ; a job is name=model folder."""

from __future__ import annotations

import sys
from pathlib import Path

from rlcore import registry

CPU = registry.load("backends", "cpu")
CPU(CPU.Options()).prepare()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText  # noqa: E402

RANKS = 2


def grouped(model) -> None:
    """Replace the experts by what ChatLearn's group GEMM keeps: a plain [experts x out, in] for each projection."""
    for layer in model.model.layers:
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
        layer.mlp.group_mlp = torch.nn.Module()
        for name, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", layer.mlp.experts.down_proj)):
            part = torch.nn.Linear(1, 1, bias=False)
            part.weight = torch.nn.Parameter(value.detach().flatten(0, 1).clone())
            layer.mlp.group_mlp.add_module(name, part)
        del layer.mlp.experts


def sharded(model, mesh, dimension: int):
    """Shard every layer and the rest; `dimension` of those that have it evenly, as FSDP2 asks."""

    def placement(parameter):
        fits = dimension < parameter.ndim and parameter.shape[dimension] % RANKS == 0
        return Shard(dimension) if dimension and fits else None

    for layer in (one for name, one in model.named_modules() if name.endswith("layers")):
        for block in layer:
            fully_shard(block, mesh=mesh, shard_placement_fn=placement)
    return fully_shard(model, mesh=mesh, shard_placement_fn=placement)


def run(job: str, folder: Path, rank: int, mesh) -> None:
    name, _, source = job.partition("=")
    kind = AutoModelForImageTextToText if hasattr(AutoConfig.from_pretrained(source), "vision_config") else AutoModelForCausalLM
    model = kind.from_pretrained(source, dtype=torch.float32)
    if "grouped" in name:
        grouped(model)
    if "lora" in name:
        import peft

        torch.manual_seed(3)
        settings = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, settings)
    model = sharded(model, mesh, int("second" in name))
    folder = folder / name
    if name.startswith("chatlearn"):
        (folder / "7").mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / "7" / f"model_world_size_{RANKS}_rank_{rank}.pt")
        return
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    state = {"model": get_model_state_dict(model), "optimizers": get_optimizer_state_dict(model, optimizer)}
    dcp.save({"fsdp_checkpoint": state}, checkpoint_id=folder / "actor" / "dcp_checkpoint")
    full = {key: value.full_tensor() for key, value in model.state_dict().items()}
    if rank == 0:
        (folder / "actor" / "model_state_dict").mkdir()
        torch.save(full, folder / "actor" / "model_state_dict" / "full_weights.pt")


def placements(folder: Path, rank: int, mesh) -> None:
    """Tensors split unevenly, along other dimensions, over a mesh of two dimensions, and whole ones."""
    pair = dist.init_device_mesh("cpu", (1, RANKS))
    value = torch.arange(7 * 5 * 3, dtype=torch.float32).reshape(7, 5, 3)
    split = {
        "first": distribute_tensor(value, mesh, [Shard(0)]),
        "second": distribute_tensor(value, mesh, [Shard(1)]),
        "last": distribute_tensor(value, mesh, [Shard(2)]),
        "tiny": distribute_tensor(value[:1], mesh, [Shard(0)]),
        "replica": distribute_tensor(value, mesh, [Replicate()]),
        "hybrid": distribute_tensor(value, pair, [Replicate(), Shard(0)]),
        "twice": distribute_tensor(value, pair, [Shard(0), Shard(0)]),
        "plain": value.bfloat16(),
        "scalar": value[0, 0, 1],
        "view": value.transpose(0, 2)[1:],
    }
    (folder / "placements").mkdir(exist_ok=True)
    torch.save(split, folder / "placements" / f"{rank}.pt")


def main() -> None:
    folder, port, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    placements(folder, rank, mesh)
    for job in sys.argv[4:]:
        run(job, folder, rank, mesh)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
