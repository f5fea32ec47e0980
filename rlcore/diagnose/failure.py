"""What a user is told when a run ends for want of memory: where, the numbers, the next step, and how to go on."""

from __future__ import annotations

import shlex
import tempfile
import time
import traceback
from itertools import islice
from pathlib import Path

from rlcore.checkpoint.folder import newest_checkpoint
from rlcore.config.changes import free
from rlcore.config.schema import RunConfig
from rlcore.device import Backend
from rlcore.diagnose.remedies import Case, remedies
from rlcore.errors import OutOfMemory, Remedy, RunError, Shortage, WorkerDied
from rlcore.model.loading import query_heads, resolve
from rlcore.model.resolved import MODEL_CACHE

_GIB = 2**30
_SHOWN = 3  # remedies


def told(error: Exception, config: RunConfig, backend: Backend, folder: Path) -> RunError | None:
    """The error to end the run with, if this one is for want of memory; else None. The traceback goes to a file."""
    shortage, headline = _shortage(error, backend), str(error)
    if shortage is None:
        return None
    if isinstance(error, WorkerDied):
        headline = headline.rpartition("; ")[0]  # how to go on is said below
    elif not isinstance(error, OutOfMemory):
        headline = str(OutOfMemory(shortage))
    given = list(islice(remedies(Case(shortage, config, backend, query_heads(resolve(config.model, MODEL_CACHE)))), _SHOWN))
    block = "\n  ".join([headline, *_numbers(shortage), *_steps(given, shortage), _onward(given, folder)])
    path = _written(folder, f"{block}\n\n{shortage.trace or ''.join(traceback.format_exception(error))}")
    return RunError(f"{block}\n  the traceback: {path}" if path else block)


def _shortage(error: Exception, backend: Backend) -> Shortage | None:
    if isinstance(error, OutOfMemory | WorkerDied):
        return error.shortage
    memory = backend.shortage(error)  # in this process, outside of any worker
    return Shortage("", memory, " ".join(str(error).split()) or repr(error)) if memory else None


def _numbers(shortage: Shortage) -> list[str]:
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in shortage.held.items() if size >= _GIB / 200)
    found = [f"held: {parts}"] if parts else []
    found += [f"free: {_gib(shortage.free[0])} of {_gib(shortage.free[1])}"] if shortage.free else []
    found += [f"longest packed row: {shortage.tokens} tokens"] if shortage.tokens else []
    return ["; ".join(found)] if found else []


def _steps(given: list[Remedy], shortage: Shortage) -> list[str]:
    if not given:
        where = "host memory a device: fewer devices a node, or larger nodes" if shortage.memory == "host" else "memory"
        return [f"no setting of this run would help; what is left is more {where}"]
    return [f"{word} {_shown(remedy)}" for word, remedy in zip(("try: ", "then:", "then:"), given, strict=False)]


def _shown(remedy: Remedy) -> str:
    devices = "more devices: " if remedy.hardware else ""
    return f"{devices}{shlex.join(remedy.overrides)} (now {remedy.now}): {remedy.why}"


def _onward(given: list[Remedy], folder: Path) -> str:
    """How to go on with the first remedy."""
    override = f" {shlex.join(given[0].overrides)}" if given else ""
    saved = newest_checkpoint(folder) or newest_checkpoint(folder / "sft")  # of a warm start
    if saved is None:
        where = "nothing is saved; start again in a new run folder" if folder.exists() else "start again"
        return f"{where}: the same command{f' with{override}' if override else ''}"
    if given and given[0].anew:
        model = shlex.quote(f"model.path={saved / 'model'}")
        return f"{saved.name} is saved; start again from it in a new run folder: the same command with {model}{override}"
    same = not given or all(free(one.partition("=")[0]) for one in given[0].overrides)
    resume = "--resume" if same else "--resume-anyway"
    return f"{saved.name} is saved; go on: the same command with --run-dir {shlex.quote(str(folder))} {resume}{override}"


def _written(folder: Path, text: str) -> Path | None:
    """The file that has the text: in the run folder or, before there is one, among the temporary files; None without room."""
    name = f"failure-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        if folder.exists():
            path = folder / f"{name}.txt"
        else:
            path = Path(tempfile.mkstemp(".txt", f"rlcore-{name}-")[1])
        path.write_text(text, encoding="utf-8")
    except OSError:
        return None
    return path


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
