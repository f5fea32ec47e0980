"""One of two processes of an HCCL group: ranks.py RANK STORE ENDPOINT. Prints results that do not depend on kernels."""

import json
import os
import sys

import conftest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from rlcore.distributed.broadcast import WeightBroadcast

rank, backend = int(sys.argv[1]), conftest.BACKEND
here = backend.device(rank)
torch.npu.set_device(here)
dist.init_process_group(backend.collectives(), store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
values, host = torch.ones(4).to(here), torch.ones(2) * (rank + 1)
for reduction in (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX):
    dist.all_reduce(values, reduction)
dist.all_reduce(host)
dist.broadcast(values, 0)
dist.all_gather_into_tensor(values.new_empty(8), values)
dist.reduce_scatter_tensor(values.new_empty(2), values)
dist.barrier()
mesh = init_device_mesh("npu", (2,))
layer = torch.distributed.fsdp.fully_shard(torch.nn.Linear(4, 4).to(here), mesh=mesh)
layer(torch.ones(2, 4).to(here)).sum().backward()
torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
backend.adamw([{"params": list(layer.parameters())}], lr=1e-3).step()

group = backend.group(sys.argv[3], rank, 2)
link = WeightBroadcast(group, here, 256)
if rank == 0:
    link.send([("a", torch.ones(3).to(here)), ("b", torch.ones(500, dtype=torch.bfloat16).to(here))])
else:
    link._share(torch.zeros(2, dtype=torch.int64).to(here))
torch.npu.synchronize()
device_group = dist.distributed_c10d._get_default_group()._get_backend(here)
print(json.dumps({
    "in host memory": host.tolist(), "group": type(group).__name__, "default": type(device_group).__name__,
    "weight": str(next(layer.parameters()).to_local().device),
}))  # fmt: skip
sys.stdout.flush()
os._exit(0)  # a group's watchdog would wait two minutes for a device that does not answer
