"""Storage operations that a real device's allocator would serve: copies between devices, allocation and release. Released
memory keeps its bytes here, filled with NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.storage import _StorageBase

_GARBAGE = 0xFF
_released: set[int] = set()  # addresses of released storages


def taken(tensor: Tensor) -> None:
    """Mark the tensor's address as in use again."""
    _released.discard(tensor.untyped_storage().data_ptr())


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _to(storage: UntypedStorage, device: Any) -> UntypedStorage:
    return _bytes(storage).to(device, copy=True).untyped_storage()


def _resize(storage: UntypedStorage, size: int) -> UntypedStorage:
    """To zero bytes, and back to the original size."""
    if size:
        _released.discard(storage.data_ptr())
    else:
        _bytes(storage).fill_(_GARBAGE)
        _released.add(storage.data_ptr())
    return storage


def install() -> None:
    """Replaces methods of torch's storages for npu tensors.

    Why: they call the device's compiled allocator, which a simulated device lacks.
    Delete when: torch lets Python register an allocator.
    """
    own = {
        "clone": lambda storage: _to(storage, "npu"),
        "cpu": lambda storage: _to(storage, "cpu"),
        "resize_": _resize,
        "nbytes": lambda storage: 0 if storage.data_ptr() in _released else theirs["nbytes"](storage),
        "size": lambda storage: storage.nbytes(),
        "resizable": lambda storage: True,
    }
    theirs = {name: getattr(UntypedStorage, name) for name in own}
    for name in own:
        setattr(UntypedStorage, name, _either(theirs[name], own[name]))
    moved = _StorageBase.to

    def to(storage: Any, *, device: Any, non_blocking: bool = False) -> Any:
        ours = "npu" in (torch.device(device).type, storage.device.type)
        return _to(storage, device) if ours else moved(storage, device=device, non_blocking=non_blocking)

    UntypedStorage.to = to


def _either(theirs: Any, own: Any) -> Any:
    def method(storage: UntypedStorage, *arguments: Any) -> Any:
        return (own if storage.device.type == "npu" else theirs)(storage, *arguments)

    return method
