"""Files of whole tensors that ranks write together, and of which each reads its part."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from rlcore_backends.common import node_address
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from rlcore.distributed import world
from rlcore.distributed.parts import Stored, fill, sharded
from rlcore.distributed.snapshot import Snapshot, fault_of, written
from rlcore.errors import ConfigError

RANKS = 4
WHOLE = {
    "even": torch.arange(32.0).view(8, 4), "uneven": torch.arange(35.0).view(5, 7), "fewer rows than ranks": torch.ones(2, 3),
    "one number": torch.tensor(7.0), "low": torch.arange(6).bfloat16(),
}  # fmt: skip
FUSED = {"experts": torch.arange(60.0).view(5, 4, 3), **WHOLE}
LAYOUTS = {"sharded": ((RANKS,), [Shard(0)]), "replicas": ((2, 2), [Replicate(), Shard(0)]), "columns": ((RANKS,), [Shard(1)])}


def names_of(name, shape):
    """Of each of the experts two halves."""
    if name != "experts":
        return {name: shape}
    return {f"experts.{number}.{half}": (shape[1] // 2, shape[2]) for number in range(shape[0]) for half in "ab"}


SPLIT = {
    **{f"experts.{number}.{half}": FUSED["experts"][number, rows] for number in range(5)
       for half, rows in (("a", slice(2)), ("b", slice(2, 4)))},
    **WHOLE,
}  # fmt: skip


def dealt(layout, tensors=WHOLE):
    """The tensors as this rank has them; those of too few dimensions are whole on every rank."""
    shape, placements = LAYOUTS[layout]
    mesh, least = init_device_mesh("cpu", shape), placements[-1].dim + 1
    return {
        name: distribute_tensor(whole, mesh, placements) if whole.dim() >= least else whole.clone()
        for name, whole in tensors.items()
    }


def main(folder, rank, address):
    """One of four ranks: each layout writes, and every layout reads what each wrote."""
    dist.init_process_group("gloo", init_method=f"tcp://{address}", rank=rank, world_size=RANKS)
    mine = {layout: dealt(layout) for layout in LAYOUTS}
    for layout, held in mine.items():
        (folder / layout).mkdir(exist_ok=True)
        snapshot = Snapshot(folder / layout, rank, RANKS)
        snapshot.tensors("parts", held.items())
        snapshot.tensors("model/model", held.items(), torch.float32)
        snapshot.tensors("split/model", dealt(layout, FUSED).items(), names=names_of)
        snapshot.write()
    dist.barrier()
    for wrote in LAYOUTS:
        stored = Stored(folder / wrote)
        for held in mine.values():
            for name, tensor in held.items():
                read = sharded(stored.part(name, tensor), tensor)
                whole = read.full_tensor() if hasattr(read, "full_tensor") else read
                assert torch.equal(whole, WHOLE[name]) and read.dtype == WHOLE[name].dtype, (wrote, name)
    for wrote, layout in product(LAYOUTS, ("sharded", "replicas")):
        empty = dealt(layout, {name: torch.zeros_like(whole) for name, whole in FUSED.items()})
        fill(empty.items(), Stored(folder / wrote / "split"), names_of)
        assert all(torch.equal(world.whole(tensor), FUSED[name]) for name, tensor in empty.items()), (wrote, layout)
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
    """In `main`; here the whole file, each byte of it written once."""
    found = load_file(folder / layout / "parts.safetensors")
    assert found.keys() == WHOLE.keys()
    assert all(torch.equal(tensor, WHOLE[name]) and tensor.dtype == WHOLE[name].dtype for name, tensor in found.items())
    marks = [json.loads((folder / layout / f".written-{rank:05d}").read_text()) for rank in range(RANKS)]
    for name in ("parts.safetensors", "model/model.safetensors"):
        assert sum(length for mark in marks for _, length, _ in mark[name]) == (folder / layout / name).stat().st_size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_is_the_same_file_however_it_was_sharded(folder, layout, tmp_path):
    snapshot = Snapshot(tmp_path)
    snapshot.tensors("model", WHOLE.items(), torch.float32)
    snapshot.write()
    assert (folder / layout / "model" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    model = load_file(folder / layout / "model" / "model.safetensors")
    assert all(torch.equal(tensor, WHOLE[name].float()) for name, tensor in model.items()) and model.keys() == WHOLE.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_that_files_have_in_parts_is_written_and_read_whole(folder, layout, tmp_path):
    """Reading in `main`, by ranks that have two experts, one or none."""
    snapshot = Snapshot(tmp_path)
    snapshot.tensors("model", FUSED.items(), names=names_of)
    snapshot.write()
    assert (folder / layout / "split" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == SPLIT.keys() and all(torch.equal(found[name], SPLIT[name]) for name in SPLIT)


def test_a_large_model_is_several_files_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr("rlcore.distributed.snapshot._FILE_BYTES", 130)
    snapshot = Snapshot(tmp_path)
    snapshot.tensors("model/model", FUSED.items(), names=names_of)
    snapshot.write()
    weight_map = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == SPLIT.keys() and len(set(weight_map.values())) == 4
    for name, file in weight_map.items():
        assert torch.equal(load_file(tmp_path / "model" / file)[name], SPLIT[name])


def test_a_node_without_the_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("rlcore.distributed.snapshot._PATIENCE", 0.1)
    snapshot = Snapshot(tmp_path / "elsewhere", 1, 2)
    with pytest.raises(OSError, match=r"rank 1 on .* does not see this folder; give --run-dir one"):
        snapshot.write()
    assert not (tmp_path / "elsewhere").exists()


def test_bytes_that_no_rank_wrote_are_missed(folder, tmp_path):
    shutil.copytree(folder / "sharded", tmp_path, dirs_exist_ok=True)
    mark = tmp_path / ".written-00001"
    told = mark.read_text()
    for wrong in ({"parts.safetensors": []}, {name: ranges + ranges for name, ranges in json.loads(told).items()}):
        mark.write_text(json.dumps(wrong))
        with pytest.raises(OSError, match=r"parts\.safetensors: \d+ bytes written, of \d+"):
            written(tmp_path, RANKS)
    mark.write_text(told)
    sums = written(tmp_path, RANKS)
    assert set(sums) == {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")}
    assert not any(fault_of(tmp_path / name, ranges) for name, ranges in sums.items())
    assert written(tmp_path, RANKS) is None, "the marks are gone"


@pytest.fixture
def stored(tmp_path):
    save_file({"tensor": torch.arange(12.0).view(4, 3)}, tmp_path / "a.safetensors")
    return tmp_path


@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (4, 2)])
def test_a_tensor_of_another_shape_is_refused(stored, shape):
    assert torch.equal(Stored(stored).part("tensor", torch.empty(4, 3)), torch.arange(12.0).view(4, 3))
    with pytest.raises(ConfigError, match=r"tensor has the shape \[4, 3\], not"):
        Stored(stored).part("tensor", torch.empty(shape))


def test_a_tensor_that_is_missing_is_named(stored):
    with pytest.raises(ConfigError, match="no tensor other"):
        Stored(stored).part("other", torch.empty(4, 3))


def test_a_file_that_is_not_whole_is_named(stored):
    path = stored / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=r"a\.safetensors: not a whole safetensors file"):
        Stored(stored)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[3]), sys.argv[2])
