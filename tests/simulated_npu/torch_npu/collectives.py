"""hccl: collectives that take tensors of the device only. gloo does the work, on the bytes of the same tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .dispatch import on_device, on_host

_OPERATORS = (
    "allreduce_", "allreduce_coalesced_", "reduce_", "broadcast_", "allgather_", "_allgather_base_",
    "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_",
    "scatter_", "alltoall_", "alltoall_base_", "barrier",
)  # fmt: skip
_REDUCED = {"allreduce_": 0, "reduce_": 0, "reduce_scatter_": 0, "_reduce_scatter_base_": 0}  # the argument with the result
_REFUSED = (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR)
_libraries: list[torch.library.Library] = []


class ProcessGroupHCCL:
    """A group beside the process's own."""

    class Options:
        _timeout = timedelta(minutes=30)

    def __init__(self, store: dist.Store, rank: int, size: int, options: Options) -> None:
        self._group = dist.ProcessGroupGloo(store, rank, size, options._timeout)

    def broadcast(self, tensor: Tensor, root: int) -> dist.Work:
        return self._group.broadcast(_lent(tensor), root)


def _lent(tensor: Tensor) -> Tensor:
    if tensor.device.type != "npu":
        raise RuntimeError(f"hccl takes tensors of npu, not of {tensor.device}")
    return on_host(tensor)


def _over(argument: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(argument, Tensor):
        return change(argument)
    return type(argument)(_over(each, change) for each in argument) if isinstance(argument, list | tuple) else argument


def _collective(name: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.c10d, name).default
    names = [argument.name for argument in operator._schema.arguments]

    def run(*arguments: Any) -> Any:
        lent = [_over(argument, _lent) for argument in arguments]
        average = "reduce_op" in names and _reduction(lent, names.index("reduce_op"))
        result, *work = made if isinstance(made := operator(*lent), tuple) else (made,)
        if average:
            work[0].wait()
            ranks = dist.ProcessGroup.unbox(arguments[names.index("process_group")]).size()
            _over(lent[_REDUCED[name]], lambda tensor: tensor.div_(ranks))
        if not work:
            return result
        return _over(result, on_device), *work

    return run


def _reduction(arguments: list[Any], place: int) -> bool:
    """Whether it is a mean, which becomes the sum that is then divided."""
    kind = dist.ReduceOp.unbox(arguments[place])
    if kind in _REFUSED:
        raise RuntimeError("Cannot use bitwise reductions with HCCL")
    if kind != dist.ReduceOp.AVG:
        return False
    arguments[place] = dist.ReduceOp(dist.ReduceOp.SUM).boxed()
    return True


def install() -> None:
    dist.Backend.register_backend(
        "hccl", lambda store, rank, size, timeout: dist.ProcessGroupGloo(store, rank, size, timeout), devices=["npu"]
    )
    library = torch.library.Library("c10d", "IMPL")
    _libraries.append(library)
    warnings.filterwarnings("ignore", message="Warning only once for all operators")  # that these kernels take another's place
    for name in _OPERATORS:
        library.impl(name, _collective(name), "PrivateUse1", allow_override=True)
