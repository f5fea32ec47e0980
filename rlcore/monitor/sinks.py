"""Writers of a run's numbers and samples: metrics.jsonl, samples.jsonl, eval.json, TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rlcore.atomic import replace_file
from rlcore.errors import RunError
from rlcore.types import Metrics


class Sinks:
    """Writes each step's metrics to `metrics.jsonl` and TensorBoard, and the samples to `samples.jsonl`."""

    def __init__(self, folder: Path, tensorboard: bool, first_step: int = 0) -> None:
        """`first_step`: the first step to be written; lines that an interrupted run wrote from there on are dropped."""
        self.folder = folder
        for name in ("metrics.jsonl", "samples.jsonl"):
            _keep_before(folder / name, first_step)
        self.metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.samples = (folder / "samples.jsonl").open("a", encoding="utf-8")
        self.tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

    def write(
        self, step: int, metrics: Metrics, samples: Iterable[Mapping[str, Any]] = (),
        evaluation: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write a step's metrics and samples, and the content of eval.json if it evaluated; RunError if the disk is full or
        writing fails otherwise."""
        with self._writing(f"step {step}"):
            if evaluation is not None:
                replace_file(self.folder / "eval.json", json.dumps(evaluation, indent=1, ensure_ascii=False).encode() + b"\n")
            self.samples.writelines(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n" for sample in samples)
            self.samples.flush()
            self.metrics.write(json.dumps({"step": step, **metrics}) + "\n")
            self.metrics.flush()
            if self.tensorboard is not None:
                for name, value in metrics.items():
                    self.tensorboard.add_scalar(name, value, step)
                self.tensorboard.flush()

    def close(self) -> None:
        with self._writing("the last lines"), ExitStack() as closing:
            for sink in (self.metrics, self.samples, self.tensorboard):
                if sink is not None:
                    closing.callback(sink.close)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.folder}: {what} cannot be written: {error}; free some room, then go on with --resume from the last"
                " checkpoint"
            ) from error


def _keep_before(path: Path, step: int) -> None:
    """Drop the lines of this step and later ones, and a line that was cut off."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)  # bytes: text also splits at U+2028 and the like, which samples hold
    replace_file(path, b"".join(line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] < step))
