"""Tensors that ranks wrote in parts, read by others and by torch's own reader."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rlcore_backends.common import node_address
from safetensors.torch import load_file
from saving import tensors
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from rlcore.distributed import parts
from rlcore.distributed.parts import Part, Stored, sharded
from rlcore.distributed.snapshot import Snapshot, written
from rlcore.errors import ConfigError

RANKS = 4
WHOLE = {
    "even": torch.arange(32.0).view(8, 4), "uneven": torch.arange(35.0).view(5, 7), "fewer rows than ranks": torch.ones(2, 3),
    "one number": torch.tensor(7.0), "low": torch.arange(6).bfloat16(),
}  # fmt: skip
LAYOUTS = {"sharded": ((RANKS,), [Shard(0)]), "replicas": ((2, 2), [Replicate(), Shard(0)]), "columns": ((RANKS,), [Shard(1)])}


def dealt(layout):
    """The tensors as this rank has them; those of too few dimensions are whole on every rank."""
    shape, placements = LAYOUTS[layout]
    mesh, least = init_device_mesh("cpu", shape), placements[-1].dim + 1
    return {
        name: distribute_tensor(whole, mesh, placements) if whole.dim() >= least else whole.clone()
        for name, whole in WHOLE.items()
    }


def main(folder, rank, address):
    """One of four ranks: each layout writes, and every layout reads what each wrote."""
    dist.init_process_group("gloo", init_method=f"tcp://{address}", rank=rank, world_size=RANKS)
    mine = {layout: dealt(layout) for layout in LAYOUTS}
    for layout, held in mine.items():
        (folder / layout).mkdir(exist_ok=True)
        snapshot = Snapshot(folder / layout, rank, RANKS)
        snapshot.own("parts", held.items())
        snapshot.whole("model", held.items())
        snapshot.write()
    dist.barrier()
    for wrote in LAYOUTS:
        stored = Stored(folder / wrote)
        for held in mine.values():
            for name, tensor in held.items():
                read = sharded(stored.part(name, tensor), tensor)
                whole = read.full_tensor() if hasattr(read, "full_tensor") else read
                assert torch.equal(whole, WHOLE[name]) and read.dtype == WHOLE[name].dtype, (wrote, name)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, address = tmp_path_factory.mktemp("parts"), node_address.free_endpoint("127.0.0.1")
    program = [sys.executable, __file__, str(folder), address]
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ranks = [subprocess.Popen([*program, str(rank)], env=where, stderr=subprocess.PIPE, text=True) for rank in range(RANKS)]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * RANKS, "".join(said)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_ranks_wrote_other_ranks_read(folder, layout):
    """In `main`; here by torch's reader, and each number once."""
    found = tensors(folder / layout)
    assert found.keys() == WHOLE.keys()
    assert all(torch.equal(tensor, WHOLE[name]) for name, tensor in found.items())
    written = [tensor.numel() for path in (folder / layout).glob("*.safetensors") for tensor in load_file(path).values()]
    assert sum(written) == sum(whole.numel() for whole in WHOLE.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_is_whole_tensors_in_float32_about_as_many_bytes_a_rank(folder, layout):
    model = tensors(folder / layout / "model")
    assert all(torch.equal(tensor, WHOLE[name].float()) for name, tensor in model.items()) and model.keys() == WHOLE.keys()
    files = sorted((folder / layout / "model").glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-{number:05d}-of-{RANKS:05d}.safetensors" for number in range(1, RANKS + 1)]


def test_a_node_without_the_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("rlcore.distributed.snapshot._PATIENCE", 0.1)
    snapshot = Snapshot(tmp_path / "elsewhere", 1, 2)
    with pytest.raises(OSError, match=r"rank 1 on .* does not see this folder; give --run-dir one"):
        snapshot.write()
    assert not (tmp_path / "elsewhere").exists()


def test_every_rank_says_what_it_wrote(folder):
    marks = folder / "sharded"
    sums = written(marks, RANKS)
    assert set(sums) == {str(path.relative_to(marks)) for path in marks.rglob("*.safetensors")}
    assert all(size == (marks / name).stat().st_size for name, (size, _) in sums.items())
    assert written(marks, RANKS) is None, "the marks are gone"


@pytest.fixture
def halves(tmp_path):
    tensor = torch.arange(12.0).view(4, 3)
    for number, half in enumerate(tensor.split(2)):
        parts.write(tmp_path / f"{number}.safetensors", {"tensor": Part(half.clone(), [2 * number, 0])})
    return tmp_path


@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (4, 2)])
def test_a_tensor_of_another_shape_is_refused(halves, shape):
    assert torch.equal(Stored(halves).part("tensor", torch.empty(4, 3)), torch.arange(12.0).view(4, 3))
    with pytest.raises(ConfigError, match=r"tensor has the shape \[4, 3\], not"):
        Stored(halves).part("tensor", torch.empty(shape))


def test_a_part_that_is_missing_is_named(halves):
    (halves / "0.safetensors").unlink()
    with pytest.raises(ConfigError, match="6 of 12 numbers of tensor are in no file"):
        Stored(halves).part("tensor", torch.empty(4, 3))
    with pytest.raises(ConfigError, match="no tensor other"):
        Stored(halves).part("other", torch.empty(4, 3))


def test_a_file_that_is_not_whole_is_named(halves):
    path = halves / "1.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=r"1\.safetensors: not a whole safetensors file"):
        Stored(halves)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[3]), sys.argv[2])
