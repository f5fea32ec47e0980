"""hccl: collectives that take only tensors of the device, executed by gloo on the same bytes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .dispatch import on_host

_OPERATORS = (  # those that rlcore and FSDP call; any other reaches gloo, which refuses npu tensors
    "allreduce_", "broadcast_", "_allgather_base_", "_reduce_scatter_base_", "scatter_", "alltoall_base_", "barrier",
)  # fmt: skip
_MEAN, _BITWISE = 1, (5, 6, 7)  # torch's reduction codes
_libraries: list[torch.library.Library] = []


class ProcessGroupHCCL:
    """A group other than the default one."""

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


def _over(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return _lent(argument)
    return type(argument)(map(_over, argument)) if isinstance(argument, list | tuple) else argument


def _collective(name: str) -> Callable[..., Any]:
    """Implement a c10d operator; returns its first argument, written in place, and the work, or the work alone."""
    operator = getattr(torch.ops.c10d, name).default
    names = [argument.name for argument in operator._schema.arguments]

    def run(*arguments: Any) -> Any:
        lent = [_over(argument) for argument in arguments]
        reduction = arguments[names.index("reduce_op")].op() if "reduce_op" in names else None
        if reduction in _BITWISE:
            raise RuntimeError("hccl has no bitwise reductions")
        if reduction == _MEAN:
            return arguments[0], _mean(name, dist.ProcessGroup.unbox(arguments[names.index("process_group")]), *lent[:2])
        result = operator(*lent)
        return (arguments[0], result[1]) if isinstance(result, tuple) else result

    return run


def _mean(name: str, group: dist.ProcessGroup, result: Any, source: Any) -> Any:
    """Sum of scaled inputs: gloo has no mean."""
    if name == "allreduce_":
        for tensor in result:
            tensor.div_(group.size())
        return group.allreduce(result, dist.AllreduceOptions()).boxed()
    return group._reduce_scatter_base(result, source / group.size(), dist.ReduceScatterOptions()).boxed()


def install() -> None:
    dist.Backend.register_backend(
        "hccl", lambda store, rank, size, timeout: dist.ProcessGroupGloo(store, rank, size, timeout), devices=["npu"]
    )
    library = torch.library.Library("c10d", "IMPL")
    _libraries.append(library)
    warnings.filterwarnings("ignore", message="Warning only once for all operators")  # overriding registered kernels
    for name in _OPERATORS:
        library.impl(name, _collective(name), "PrivateUse1", allow_override=True)
