"""Transport between the controller and the worker processes: pickled once, bytes counted, large arrays out of band, and values
read more than once in Ray's object store, of which each node holds one copy."""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray import ObjectRef, cloudpickle
from torch import Tensor

from rlcore.runtime.pool import Store
from rlcore.types import Group

T = TypeVar("T")
_BESIDE = 1 << 16  # bytes from which an array stays outside the pickle


@dataclass(frozen=True)
class Handle:
    """The controller's reference to a value in the object store. A worker receives the value instead."""

    reference: ObjectRef


@dataclass(frozen=True)
class Parcel:
    """A pickled value."""

    pickled: bytes
    buffers: list[pickle.PickleBuffer]  # its large arrays, out of band
    references: list[ObjectRef]  # object-store values that it refers to
    stored: int  # bytes that its sender put into the object store since its last parcel

    @property
    def bytes(self) -> int:
        return len(self.pickled) + sum(memoryview(buffer).nbytes for buffer in self.buffers) + self.stored


def packed(value: Any, stored: int = 0) -> Parcel:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return Parcel(file.getvalue(), pickler.beside, list(pickler.references), stored)


def unpacked(parcel: Parcel, named: Callable[[Sequence[ObjectRef]], Sequence[Any]]) -> Any:
    """`named`: maps references to what the receiver gets in their place."""
    return _Unpickler(parcel, named(parcel.references)).load()


def handles(references: Sequence[ObjectRef]) -> list[Any]:
    """`named` of the controller: handles."""
    return [Handle(reference) for reference in references]


def values(references: Sequence[ObjectRef]) -> list[Any]:
    """`named` of a worker: the values themselves."""
    return [unpacked(parcel, values) for parcel in ray.get(list(references))] if references else []


class Outbox:
    """A worker's side: packs its answers, and puts values that the controller need not read into the object store."""

    def __init__(self) -> None:
        self._stored = 0

    def put(self, value: T) -> T:
        parcel = packed(value)
        self._stored += parcel.bytes
        return cast(T, Handle(ray.put(parcel)))

    def answer(self, value: Any) -> Parcel:
        stored, self._stored = self._stored, 0
        return packed(value, stored)


class RayStore(Store):
    """The controller's side. A group stays in the object store for as long as the controller holds it."""

    def __init__(self) -> None:
        self._groups: WeakKeyDictionary[Group, Group] = WeakKeyDictionary()
        self._bytes = 0
        self._lock = threading.RLock()  # reference and actor may run concurrently, and answers arrive in other threads

    def put(self, value: T) -> T:
        return cast(T, Handle(ray.put(self.sent(value))))

    def group(self, group: Group) -> Group:
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self.put(group.for_models())
            return self._groups[group]

    def bytes(self) -> int:
        with self._lock:
            taken, self._bytes = self._bytes, 0
        return taken

    def sent(self, value: Any) -> Parcel:
        """Pack `value` and count its bytes."""
        parcel = packed(value)
        self._count(parcel)
        return parcel

    def received(self, parcel: Parcel) -> Any:
        self._count(parcel)
        return unpacked(parcel, handles)

    def _count(self, parcel: Parcel) -> None:
        with self._lock:
            self._bytes += parcel.bytes


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5, buffer_callback=self._stays)
        self.beside: list[pickle.PickleBuffer] = []
        self.references: dict[ObjectRef, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if isinstance(value, Handle):
            return self.references.setdefault(value.reference, len(self.references))
        return None

    def reducer_override(self, value: Any) -> Any:
        """Pickle CPU tensors as bytes: torch's own pickles copy whole storages, through a file format."""
        if type(value) is Tensor and value.device.type == "cpu" and value.layout == torch.strided and not value.requires_grad:
            return _tensor, (_bytes(value), value.dtype, value.shape)
        return super().reducer_override(value)

    def _stays(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether the buffer goes into the pickle."""
        if memoryview(buffer).nbytes < _BESIDE:
            return True
        self.beside.append(buffer)
        return False


class _Unpickler(pickle.Unpickler):
    def __init__(self, parcel: Parcel, named: Sequence[Any]) -> None:
        super().__init__(io.BytesIO(parcel.pickled), buffers=parcel.buffers)
        self._named = named

    def persistent_load(self, number: int) -> Any:
        return self._named[number]


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def _tensor(data: NDArray[np.uint8], dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """Rebuild a tensor; copied where the data is in shared memory, which is read-only."""
    own = data if data.flags.writeable else data.copy()
    return torch.from_numpy(own).view(dtype).view(shape)
