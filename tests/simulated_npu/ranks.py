"""One of two ranks that call the device's collectives: ranks.py RANK STORE; the first prints its results."""

import json
import sys

import torch
import torch_npu  # noqa: F401
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rlcore.distributed.parts import sharded

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before torch 2.13
rank = int(sys.argv[1])
dist.init_process_group("cpu:gloo,npu:hccl", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
mine, results = torch.tensor([1.0, 2.0], device="npu") * (rank + 1), {}
for name in ("SUM", "AVG", "MAX"):
    whole = mine.clone()
    dist.all_reduce(whole, getattr(dist.ReduceOp, name))
    results[name] = whole.tolist()
for name in ("SUM", "AVG"):
    half = torch.empty(1, device="npu")
    reduce_scatter(half, mine, getattr(dist.ReduceOp, name))
    results[f"scattered {name}"] = half.tolist()
try:
    dist.all_reduce(mine.long(), dist.ReduceOp.BAND)
except RuntimeError as error:
    results["BAND"] = str(error)
host = mine.cpu()
dist.all_reduce(host)
results["in host memory"] = host.tolist()
mesh = init_device_mesh("npu", (2,))
resting = distribute_tensor(torch.zeros(4, device="npu"), mesh, [Shard(0)]).to("cpu")
dealt = sharded(torch.arange(4.0)[2 * rank : 2 * rank + 2], resting).to_local()
results["dealt to host memory"] = [dealt.device.type, *dealt.tolist()]
if rank == 0:
    print(json.dumps(results))
