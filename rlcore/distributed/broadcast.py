"""Weight broadcast between pools: named tensors from the first process of a group to all others, one bucket at a time.

A bucket is three messages: two sizes, a header (JSON: name, dtype, shape, fingerprint of each tensor) and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlcore.distributed.fingerprint import fingerprint
from rlcore.errors import RunError
from rlcore.types import NamedTensors

_ALIGNED = 16  # bytes; every tensor starts at a multiple
Entry = tuple[str, str, Sequence[int], int]  # name, dtype, shape, hash


class WeightBroadcast:
    """One end of the broadcast. Holds one bucket, or one larger tensor."""

    def __init__(self, group: Any, device: torch.device, bucket_bytes: int) -> None:
        """`group`: has `broadcast`, like torch.distributed.ProcessGroup."""
        self._group, self._device, self._room = group, device, bucket_bytes

    def send(self, weights: NamedTensors) -> None:
        entries: list[Entry] = []
        content, used = torch.empty(self._room, dtype=torch.uint8, device=self._device), 0
        for name, tensor in weights:
            if used + tensor.nbytes > len(content):
                self._pass_on(entries, content[:used])
                entries, used = [], 0
                content = content if tensor.nbytes <= len(content) else content.new_empty(tensor.nbytes)
            entries.append((name, *fingerprint(tensor)))
            content[used : used + tensor.nbytes] = tensor.detach().contiguous().view(-1).view(torch.uint8)
            used += _aligned(tensor.nbytes)
        self._pass_on(entries, content[:used])
        self._share(torch.zeros(2, dtype=torch.int64, device=self._device))

    def receive(self) -> NamedTensors:
        """Yield the tensors being sent. RunError names one whose fingerprint is not the sender's."""
        while (sizes := self._share(torch.empty(2, dtype=torch.int64, device=self._device)).tolist())[0]:
            header, content = (self._share(torch.empty(size, dtype=torch.uint8, device=self._device)) for size in sizes)
            start = 0
            for name, dtype, shape, sent in json.loads(bytes(header.tolist())):
                kind: torch.dtype = getattr(torch, dtype)
                size = math.prod(shape) * kind.itemsize
                tensor = content[start : start + size].view(kind).view(shape)
                start += _aligned(size)
                if fingerprint(tensor)[2] != sent:
                    raise RunError(f"weight sync: {name} was changed on its way between the pools")
                yield name, tensor

    def _pass_on(self, entries: Sequence[Entry], content: Tensor) -> None:
        if entries:
            header = torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8, device=self._device)
            for message in (torch.tensor([len(header), len(content)], device=self._device), header, content):
                self._share(message)

    def _share(self, message: Tensor) -> Tensor:
        self._group.broadcast(message, 0).wait()
        return message


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
