"""Weights, gradients and optimizer state sharded over the ranks of a pool (FSDP2, arXiv 2304.11277), and their all-gather.

Weights stay float32 and are gathered layer by layer in the compute dtype; gradients are reduced in float32, once per optimizer
step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from rlcore.distributed.parts import Published, Stored, fill
from rlcore.errors import ConfigError
from rlcore.types import NamedTensors

BUCKET_BYTES = 512 * 2**20
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
T = TypeVar("T")


@dataclass(frozen=True)
class Sharding:
    """Settings for sharding a model over the ranks of a pool."""

    mesh: DeviceMesh  # [shard], or [replicate, shard]
    compute_dtype: torch.dtype
    offload: bool = False  # weights, gradients and optimizer stay in host memory between uses
    exchange: Exchange | None = None  # all-gather for weight sync; None is one collective per bucket
    bucket_bytes: int = BUCKET_BYTES
    reshard_after_forward: bool = True  # free a block's gathered weights between the forward and the backward pass
    sum_each: bool = False  # reduce-scatter gradients after each micro-batch: more traffic, no full gradients

    @property
    def home(self) -> torch.device:
        """Device that holds the weights between uses."""
        return torch.device("cpu" if self.offload else self.mesh.device_type)

    def apply(self, root: nn.Module, blocks: Iterable[nn.Module], whole: nn.Module | None = None) -> None:
        """Shard `root`: each block's weights are gathered when it runs, those outside of blocks when `root` does. Every rank
        keeps all of `whole`, a submodule of `root`."""
        low = None if self.compute_dtype == torch.float32 else self.compute_dtype
        precision = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        pinned = self.mesh.device_type != "cpu"
        offload = CPUOffloadPolicy(pin_memory=pinned) if self.offload else OffloadPolicy()
        kept = set(whole.parameters()) if whole is not None else set()
        for module in (*blocks, root):
            sharded = fully_shard(
                module, mesh=self.mesh, mp_policy=precision, offload_policy=offload, ignored_params=kept,
                reshard_after_forward=self.reshard_after_forward and module is not root,
            )
            sharded.set_gradient_divide_factor(1.0)  # a sum, not a mean: loss weights span all ranks
            sharded.set_force_sum_reduction_for_comms(True)


def read(root: nn.Module, model: nn.Module, names: Published, folder: Path, device: torch.device) -> None:
    """Allocate meta tensors and fill the parameters: each rank reads its own rows from the files in `folder`, which have
    these `names`.

    ConfigError names the first parameter that the files lack.
    """
    root._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    stored = Stored(folder)
    for wanted in (part for name, parameter in model.named_parameters() for part in names(name, parameter.shape)):
        if wanted not in stored:
            raise ConfigError(
                f"sharding.meta_init: the weights in {folder} have no tensor {wanted}, under which this family's are read"
                " row by row; set sharding.meta_init=false to have every rank read the whole model"
            )
    fill(model.named_parameters(), stored, names)


def accumulated(module: nn.Module, rows: Sequence[T], sharding: Sharding | None) -> Iterator[T]:
    """Iterate over micro-batches, reducing gradients in the backward pass of the last one, or of each with `sum_each`."""
    for number, row in enumerate(rows, start=1):
        if sharding and isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(sharding.sum_each or number == len(rows))
        yield row


def at_rest(module: nn.Module) -> None:
    """Reshard after forward-only passes, so that no gathered weight goes stale."""
    if isinstance(module, FSDPModule):
        module.reshard()


class Exchange(Protocol):
    """All-gather of shards over the ranks of a group."""

    def __call__(self, parts: Sequence[Tensor], most: Sequence[int]) -> Sequence[Tensor]:
        """All-gather this rank's `parts`; `most` is the largest rank's element count of each -> [ranks x most] each, in rank
        order. The results stay valid until the next call but one."""
        ...


class Collective:
    """`Exchange` by one all-gather of all parts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def __call__(self, parts: Sequence[Tensor], most: Sequence[int]) -> Sequence[Tensor]:
        ranks, first = self._group.size(), parts[0]
        mine = torch.empty(sum(most), dtype=first.dtype, device=first.device)
        for place, part in zip(mine.split(list(most)), parts, strict=True):
            place[: part.numel()] = part
        everyones = torch.empty(ranks, len(mine), dtype=mine.dtype, device=mine.device)
        _all_gather(everyones.view(-1), mine, group=self._group)
        return [columns.flatten() for columns in everyones.split(list(most), dim=1)]


def gathered(named: NamedTensors, limit: int = BUCKET_BYTES, exchange: Exchange | None = None) -> NamedTensors:
    """Yield whole tensors, in order and one at a time; all ranks iterate together. At most `limit` bytes are gathered at once,
    or one larger tensor."""
    bucket: list[tuple[str, DTensor]] = []
    size = 0
    for name, parameter in named:
        tensor = parameter.detach()
        if not _by_rows(tensor):
            yield from _opened(bucket, exchange)
            bucket, size = [], 0
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            continue
        if bucket and (size + tensor.nbytes > limit or tensor.dtype != bucket[0][1].dtype):
            yield from _opened(bucket, exchange)
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    yield from _opened(bucket, exchange)


def _by_rows(tensor: Tensor) -> TypeGuard[DTensor]:
    return isinstance(tensor, DTensor) and tensor.placements[-1] == Shard(0) and not any(
        placement.is_shard() or placement.is_partial() for placement in tensor.placements[:-1]
    )  # fmt: skip


def _opened(bucket: Sequence[tuple[str, DTensor]], exchange: Exchange | None) -> Iterator[tuple[str, Tensor]]:
    if not bucket:
        return
    mesh = bucket[0][1].device_mesh
    group = mesh.get_group(mesh.ndim - 1)
    most = [math.ceil(len(tensor) / group.size()) * tensor.stride(0) for _, tensor in bucket]
    everyones = (exchange or Collective(group))([tensor.to_local().flatten() for _, tensor in bucket], most)
    for elements, (name, tensor) in zip(everyones, bucket, strict=True):
        yield name, elements[: tensor.numel()].view(tensor.shape)
