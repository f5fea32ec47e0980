"""Saves checkpoints while training goes on: it waits only until the tensors are copied."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from rlcore.atomic import replace_file
from rlcore.checkpoint.folder import LATEST, STATE, SUMS, checkpoints, drafts, read_state
from rlcore.checkpoint.state import random_states
from rlcore.distributed.snapshot import written
from rlcore.errors import RunError, WorkerDied

_POLL = 0.02  # seconds
_PATIENCE = 120.0  # seconds for a checkpoint that is being written when the run fails


class Copied(Protocol):
    """What a checkpoint is of."""

    @property
    def ranks(self) -> int: ...

    def save(self, folder: Path) -> None:
        """Copy it; every rank goes on to write its part to `folder`, and says so there."""
        ...

    def unwritten(self) -> str | None:
        """Why a rank could not."""
        ...


class Saver:
    """Writes the checkpoints of a run, one at a time. On exit the last one is whole, or its error is raised."""

    def __init__(self, run_folder: Path, actor: Copied, keep: int | None = None, best: str | None = None) -> None:
        """`keep`: number of newest checkpoints, None is all. `best`: metric whose best one is kept too."""
        self.run_folder, self.actor, self.keep, self.best = run_folder.absolute(), actor, keep, best
        self._writing: threading.Thread | None = None
        self._name, self._fault = "", ""
        self._committed, self._abandoned = True, False

    def __enter__(self) -> Saver:
        for draft in drafts(self.run_folder):
            shutil.rmtree(draft, ignore_errors=True)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if not self._committed:
                return
            if error is None or isinstance(error, KeyboardInterrupt):
                self.wait()
            elif self._writing and not isinstance(error, WorkerDied):  # a rank may wait for one that failed: it is not asked
                self._writing.join(_PATIENCE)
        finally:
            self._abandoned = True

    def save(self, name: str, state: Mapping[str, Any], files: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """Copy what is saved; a thread writes it, with these files. It becomes `checkpoints/<name>` after `commit`.

        RunError if this one or the one before cannot be written.
        """
        self.wait()
        self._name, self._fault, self._committed, folder = name, "", False, self.run_folder / "checkpoints" / name
        draft = folder.with_name(f".{name}.partial")
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            self.actor.save(draft)
        except OSError as error:
            raise self._failure(str(error)) from error
        content = {"random": random_states(), **state}
        self._writing = threading.Thread(target=self._finish, args=(draft, folder, content, files), name="checkpoints")
        self._writing.start()

    def commit(self) -> None:
        """Let the checkpoint appear as soon as it is whole: a run that goes on from it finds its own lines up to there."""
        self._committed = True

    def check(self) -> None:
        """Raise RunError if the checkpoint that is being written cannot be."""
        if self._writing is None:
            return
        if self._writing.is_alive() and not self._abandoned and (fault := self.actor.unwritten()):
            self._fault, self._abandoned = fault, True
        if self._abandoned or not self._writing.is_alive():
            self._writing.join()
            self._writing = None
            if self._fault:
                raise self._failure(self._fault)

    def wait(self) -> None:
        """Return when the checkpoint is whole; RunError if it cannot be written."""
        while self._writing is not None:
            self._writing.join(_POLL)
            self.check()

    def _failure(self, why: str) -> RunError:
        shutil.rmtree(self.run_folder / "checkpoints" / f".{self._name}.partial", ignore_errors=True)
        return RunError(f"{self.run_folder / 'checkpoints' / self._name} cannot be written: {why}; {self._whole()}")

    def _whole(self) -> str:
        """How to go on."""
        pointer = self.run_folder / "checkpoints" / LATEST
        if not pointer.exists():
            return "there is none before it; free some room and start again"
        return f"{pointer.read_text(encoding='utf-8').strip()} is whole: free some room, then go on from it with --resume"

    def _finish(self, draft: Path, folder: Path, content: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Wait for the ranks, then turn the draft into a checkpoint."""
        try:
            for name, data in files.items():
                (draft / name).write_bytes(data)
            sums = None
            while sums is None or not self._committed:
                if self._abandoned:
                    return
                sums = written(draft, self.actor.ranks) if sums is None else sums
                time.sleep(_POLL)
            sums |= {name: [[0, len(data), zlib.crc32(data)]] for name, data in files.items()}
            (draft / SUMS).write_text(json.dumps(sums), encoding="utf-8")
            (draft / STATE).write_text(json.dumps(content), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(draft, folder)
            replace_file(folder.parent / LATEST, folder.name)
            self._remove_old()
        except Exception as error:
            self._fault = str(error)

    def _remove_old(self) -> None:
        if self.keep is None:
            return
        all_of_them = checkpoints(self.run_folder)
        kept = {*all_of_them[-self.keep :]}
        if self.best and (scored := {one: score for one in all_of_them if (score := read_state(one).get("best")) is not None}):
            kept.add(max(scored, key=scored.__getitem__))
        for folder in all_of_them:
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)
