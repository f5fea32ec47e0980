"""Weight transfer engine of a vLLM server: receives the trainer's broadcast, with fingerprints, through vLLM's own endpoints.

vLLM's engines (NCCL, IPC) carry names and tensors, and have no receipt. This one runs on every device, over host memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlcore.distributed.broadcast import WeightBroadcast
from rlcore.errors import RunError

from ..common import node_address, rendezvous
from .manifest import WeightTransfer


@dataclass
class Meeting(WeightTransferInitInfo):
    """Where the servers' workers meet the trainer, which is rank 0."""

    address: str  # host:port
    first_rank: int  # of this server's workers
    size: int
    seconds: float  # without progress until a broadcast fails


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """Nothing: the broadcast says what it holds."""


class Transfer(WeightTransferEngine[Meeting, Bucket]):
    """Receives all weights of one update in one call."""

    init_info_cls = Meeting
    update_info_cls = Bucket
    model: Any

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.watching: WeightTransfer | None = None  # of the update under way, set before it starts
        self._broadcast: WeightBroadcast | None = None

    def init_transfer_engine(self, init_info: Meeting) -> None:
        own = node_address.towards(init_info.address.rsplit(":", 1)[0].strip("[]"), "the trainer's address")
        rank = init_info.first_rank + self.parallel_config.rank
        group = rendezvous.host_group(init_info.address, own, rank, init_info.size, init_info.seconds)
        self._broadcast = WeightBroadcast(group, torch.device("cpu"), 0)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Bucket) -> None:
        """Load what arrives. All of it is received even if the engine refuses a tensor: the other servers wait for this one."""
        assert self._broadcast and self.watching, "the trainer connects and announces an update first"
        arrivals = _Arrivals(self._broadcast)
        try:
            self.model.load_weights(self.watching.watch(arrivals))
        except BaseException:
            arrivals.drain()
            with contextlib.suppress(Exception):  # leaves the half-done update, so that a full one can follow
                finalize_layerwise_reload(self.model, self.model_config)
            raise

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self._broadcast = None


class _Arrivals:
    """The tensors of one update."""

    def __init__(self, broadcast: WeightBroadcast) -> None:
        self._broadcast, self._over = broadcast, False

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._broadcast.receive()
        self._over = True

    def drain(self) -> None:
        """Receive the rest. A tensor that was changed on its way ends `receive` between two buckets, so that it can go on."""
        while not self._over:
            with contextlib.suppress(RunError):
                for _ in self:
                    pass

