"""One rank's part of a checkpoint, copied to host memory while training waits and written while it goes on.

A file holds whole tensors whatever the ranks are: each writes its rows to the bytes where they belong.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlcore import tensor_files
from rlcore.atomic import replace_file
from rlcore.distributed.parts import Published, Rows, as_named, own_rows
from rlcore.tensor_files import Spec
from rlcore.types import NamedTensors

Ranges = list[list[int]]  # first byte, bytes, CRC-32 of them
_FILE_BYTES = 5 * 10**9
_MARK = ".written-"
_CHUNK = 1 << 24  # bytes read at once for a checksum
_PATIENCE = 10.0  # seconds for a network file system to show a new folder


class Snapshot:
    """Adding tensors copies this rank's rows; writing is not collective, and may run in any thread."""

    def __init__(self, folder: Path, rank: int = 0, ranks: int = 1) -> None:
        """`folder`: of the checkpoint, which every rank sees."""
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self._writes: list[Callable[[], None]] = []
        self._written: dict[str, Ranges] = {}
        self.fault: str | None = None  # why it could not be written

    def tensors(
        self, stem: str, named: NamedTensors, dtype: torch.dtype | None = None, names: Published = as_named
    ) -> None:  # fmt: skip
        """Add `<stem>.safetensors`, or several files and their index. `named`: the same on all ranks, sharded or whole.

        `dtype` converts them all; `names` are those that the files have.
        """
        specs, held = dict[str, Spec](), dict[str, Rows]()
        for name, tensor in named:
            specs[name] = Spec(tuple(tensor.shape), dtype or tensor.dtype)
            if (rows := own_rows(tensor, specs[name].dtype)) is not None:
                held[name] = rows
        if not specs:
            return
        placed = tensor_files.files(stem, specs, _FILE_BYTES)
        contents = {file: _contents({tensor: specs[tensor] for tensor in tensors}, names) for file, tensors in placed.items()}
        if len(placed) > 1:
            self.text(tensor_files.index_name(stem), tensor_files.index(specs, contents))
        for file, tensors in placed.items():
            header = tensor_files.header(contents[file])
            self._writes.append(partial(self._write, file, header, {tensor: specs[tensor] for tensor in tensors}, held))

    def text(self, name: str, content: str) -> None:
        """Add a small file, which the first rank writes."""

        def write(folder: Path) -> None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            replace_file(folder / name, content)

        self.files(write)

    def files(self, write: Callable[[Path], Any]) -> None:
        """Add what the first rank writes when it is given the folder."""
        if self.rank == 0:
            self._writes.append(lambda: write(self.folder))

    def begin(self) -> None:
        """Write in a thread; `fault` has the reason if that fails."""
        threading.Thread(target=self._begun, name="checkpoint").start()

    def write(self) -> None:
        """Write it all, then say so in the folder (`written`). Each copy is freed when it is written."""
        self._find_folder()
        while self._writes:
            self._writes.pop(0)()
        replace_file(self.folder / f"{_MARK}{self.rank:05d}", json.dumps(self._written))

    def _write(self, name: str, header: bytes, specs: Mapping[str, Spec], held: dict[str, Rows]) -> None:
        """Write this rank's rows of a file, and the header if it is the first rank."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with _Ranged(path) as file:
            if self.rank == 0:
                file.put(header, 0)
            begins = accumulate((spec.nbytes for spec in specs.values()), initial=len(header))
            for (tensor, spec), begin in zip(specs.items(), begins, strict=False):
                if rows := held.pop(tensor, None):
                    file.put(_bytes(rows.tensor), begin + rows.begin * spec.dtype.itemsize)
        self._written[name] = file.ranges

    def _find_folder(self) -> None:
        """OSError on a node that does not see the folder, which the controller has made."""
        limit = time.monotonic() + _PATIENCE
        while not self.folder.is_dir():
            if time.monotonic() > limit:
                who = f"rank {self.rank} on {socket.gethostname()}"
                raise OSError(f"{who} does not see this folder; give --run-dir one on a file system that every node has")
            time.sleep(_PATIENCE / 20)

    def _begun(self) -> None:
        try:
            self.write()
        except Exception as error:
            self.fault = str(error)
        finally:
            self._writes.clear()


class _Ranged:
    """A file that others write to as well, each other bytes of it. Opened for writing alone: a network file system would
    otherwise read pages, change them and write back bytes of others."""

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb")
        self.ranges = Ranges()

    def __enter__(self) -> _Ranged:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, data: bytes | memoryview, begin: int) -> None:
        if not self.ranges or sum(self.ranges[-1][:2]) != begin:
            self.ranges.append([begin, 0, 0])
            self._file.seek(begin)
        self._file.write(data)
        last = self.ranges[-1]
        last[1:] = last[1] + len(data), zlib.crc32(data, last[2])


def _contents(specs: Mapping[str, Spec], names: Published) -> dict[str, Spec]:
    """What a file's header says of these tensors, whose bytes it has in this order."""
    return {
        part: Spec(tuple(shape), spec.dtype) for name, spec in specs.items() for part, shape in names(name, spec.shape).items()
    }


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def written(folder: Path, ranks: int) -> dict[str, Ranges] | None:
    """What was written of every file of tensors, by name; None until all ranks have written theirs.

    OSError if a file lacks bytes, or has some twice.
    """
    marks = [folder / f"{_MARK}{rank:05d}" for rank in range(ranks)]
    if not all(mark.exists() for mark in marks):
        return None
    files = dict[str, Ranges]()
    for mark in marks:
        for name, ranges in json.loads(mark.read_text(encoding="utf-8")).items():
            files.setdefault(name, []).extend(ranges)
    for name, ranges in files.items():
        ranges.sort()
        ends = [begin + length for begin, length, _ in ranges]
        if [begin for begin, *_ in ranges] != [0, *ends[:-1]]:
            raise OSError(f"{name}: {sum(length for _, length, _ in ranges)} bytes written, of {ends[-1]}")
    for mark in marks:
        mark.unlink()
    return dict(sorted(files.items()))


def fault_of(path: Path, ranges: Ranges) -> str | None:
    """How a file differs from what was written; OSError if it cannot be read."""
    size, wrote = path.stat().st_size, sum(ranges[-1][:2])
    if size != wrote:
        return f"has {size} bytes, {wrote} were written"
    with path.open("rb") as file:
        for _, length, crc in ranges:
            found = 0
            while length and (chunk := file.read(min(length, _CHUNK))):
                length, found = length - len(chunk), zlib.crc32(chunk, found)
            if found != crc:
                return "was changed after it was written: its checksum is another"
    return None
