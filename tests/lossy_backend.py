"""A backend with two faults: attention is rounded to bf16, and reductions return each rank's own part."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from rlcore_backends.cpu.backend import CpuBackend

_kept: list[Any] = []


class LossyBackend(CpuBackend):
    name: ClassVar[str] = "lossy"

    def prepare(self) -> None:
        super().prepare()
        from transformers import AttentionInterface

        from rlcore.model import attention

        exact = AttentionInterface()[attention.NAME]

        def rounded(*states: Any, **options: Any) -> tuple[torch.Tensor, None]:
            output = exact(*states, **options)[0]
            return output.bfloat16().to(output.dtype), None

        AttentionInterface.register(attention.NAME, rounded)
        library = torch.library.Library("c10d", "IMPL")
        library.impl("allreduce_", dropped, "CPU", allow_override=True)
        _kept.append(library)


def dropped(tensors: list[torch.Tensor], group: Any, *_: Any) -> Any:
    """A barrier instead of a reduction."""
    processes = torch.distributed.ProcessGroup.unbox(group)._get_backend(torch.device("cpu"))
    return tensors, processes.allreduce([torch.zeros(1)]).boxed()
