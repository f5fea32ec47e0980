"""A third-party backend: this module, and the entry point in pyproject.toml.

    pip install --no-deps examples/new_backend
    rlcore check --backend new
    rlcore grpo examples/quickstart.yaml --backend new

Its device is the CPU, which every machine has, with two kernels as examples. All that a backend can define, with defaults, is
in rlcore/device.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PositiveInt

from rlcore.config.sections import Strict
from rlcore.device import Backend

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from rlcore.model.attention import Ragged


class NewOptions(Strict):
    threads: PositiveInt = 2
    """CPU threads per process."""


class NewBackend(Backend):
    """Describes the device. torch is imported only inside methods that need it."""

    name: ClassVar[str] = "new"
    Options = NewOptions
    options: NewOptions
    own_memory: ClassVar[bool] = False

    def environment(self) -> Mapping[str, str]:
        return {"OMP_NUM_THREADS": str(min(self.options.threads, len(os.sched_getaffinity(0))))}

    def device(self, local_rank: int) -> torch.device:
        import torch

        return torch.device("cpu")

    def collectives(self) -> str:
        return "gloo"

    def group(self, address: str, rank: int, size: int) -> Any:
        from torch import distributed

        host, port = address.rsplit(":", 1)
        store = distributed.TCPStore(host.strip("[]"), int(port), size, is_master=rank == 0)
        return distributed.ProcessGroupGloo(store, rank, size, timedelta(hours=24))

    def prepare(self) -> None:
        import torch
        from rlcore_backends.cpu.backend import cure_torchvision

        cure_torchvision()  # for engines whose torch and torchvision builds do not match
        from rlcore.model import attention

        attention.use(one_by_one, (torch.float32, torch.bfloat16))

    def fuse(self, model: nn.Module) -> nn.Module:
        """Replace each RMSNorm of four operators by one call."""
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = MethodType(norm, module)
        return model


def one_by_one(query: Tensor, key: Tensor, value: Tensor, spans: Ragged, scale: float) -> Tensor:
    """`rlcore.model.attention.Kernel`: one call per span. A real device has one call for all of them."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    own, seen = spans.query_lengths, spans.key_lengths
    outputs = []
    for q, k, v in zip(query.split(own), key.split(seen), value.split(seen), strict=True):
        before = len(k) - len(q)  # keys that every query attends to
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(before)
        states = (each.transpose(0, 1)[None] for each in (q, k, v))
        attended = scaled_dot_product_attention(*states, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def norm(self: Any, states: Tensor) -> Tensor:
    """Forward of an RMSNorm, computed in float32 for any input dtype."""
    from torch.nn.functional import rms_norm

    return self.weight * rms_norm(states.float(), self.weight.shape, eps=self.variance_epsilon).to(states.dtype)
