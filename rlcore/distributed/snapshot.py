"""One rank's part of a checkpoint, copied to host memory while training waits and written while it goes on."""

from __future__ import annotations

import json
import socket
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from rlcore.atomic import replace_file
from rlcore.distributed import parts
from rlcore.distributed.fsdp import gathered
from rlcore.model_files import INDEX
from rlcore.types import NamedTensors

_MARK = ".written-"
_CHUNK = 1 << 24  # bytes read at once for a checksum
_PATIENCE = 10.0  # seconds for a network file system to show a new folder


class Snapshot:
    """Adding tensors is collective and copies them; writing is neither, and may run in any thread."""

    def __init__(self, folder: Path, rank: int = 0, ranks: int = 1) -> None:
        """`folder`: of the checkpoint, which every rank sees."""
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self._writes: list[Callable[[], None]] = []
        self._files: list[Path] = []
        self.fault: str | None = None  # why it could not be written

    def whole(self, folder: str, named: NamedTensors) -> None:
        """Add whole tensors for a Hugging Face folder, in float32; each rank writes about as many bytes of them."""
        loads, files = [0] * self.ranks, dict[str, str]()
        mine = dict[str, Tensor]()
        for name, tensor in gathered(named):
            rank = loads.index(min(loads))
            loads[rank] += tensor.nbytes
            files[name] = self._name("model", rank)
            if rank == self.rank:
                mine[name] = tensor.to("cpu", copy=True).float().contiguous()
        if mine:
            self._file(f"{folder}/{self._name('model', self.rank)}", lambda path: save_file(mine, path, {"format": "pt"}))
        if self.ranks > 1:
            index = {"metadata": {"total_size": sum(loads)}, "weight_map": files}
            self.text(f"{folder}/{INDEX}", json.dumps(index, indent=2) + "\n")

    def first(self, name: str, named: NamedTensors) -> None:
        """Add a file of whole tensors, few and small, which the first rank writes."""
        tensors = {key: tensor.to("cpu", copy=True).contiguous() for key, tensor in gathered(named) if self.rank == 0}
        if tensors:
            self._file(name, lambda path: save_file(tensors, path))

    def own(self, stem: str, named: NamedTensors) -> None:
        """Add this rank's parts of tensors."""
        mine = {name: part for name, tensor in named if (part := parts.own(tensor)) is not None}
        if mine:
            self._file(self._name(stem, self.rank), lambda path: parts.write(path, mine))

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
        """Write it all, then say so in the folder (`written`). The copies are freed one file after the other."""
        self._find_folder()
        while self._writes:
            self._writes.pop(0)()
        sums = {str(path.relative_to(self.folder)): checksum(path) for path in self._files}
        replace_file(self.folder / f"{_MARK}{self.rank:05d}", json.dumps(sums))

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

    def _file(self, name: str, write: Callable[[Path], None]) -> None:
        path = self.folder / name
        self._files.append(path)

        def made() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)

        self._writes.append(made)

    def _name(self, stem: str, rank: int) -> str:
        return f"{stem}.safetensors" if self.ranks == 1 else f"{stem}-{rank + 1:05d}-of-{self.ranks:05d}.safetensors"


def written(folder: Path, ranks: int) -> dict[str, list[int]] | None:
    """Bytes and checksum of every file of tensors, by name; None until all ranks have written theirs."""
    marks = [folder / f"{_MARK}{rank:05d}" for rank in range(ranks)]
    if not all(mark.exists() for mark in marks):
        return None
    sums = {name: told for mark in marks for name, told in json.loads(mark.read_text(encoding="utf-8")).items()}
    for mark in marks:
        mark.unlink()
    return dict(sorted(sums.items()))


def checksum(path: Path) -> list[int]:
    """Bytes, CRC-32."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]
