"""A process of `rlcore check`: `python -m rlcore.diagnose.conformance.section SETTINGS FOLDER MODULE.FUNCTION [ARGUMENT ...]`.
The function is imported once the backend is prepared."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import torch

from rlcore import registry
from rlcore.config.loader import validate
from rlcore.config.schema import RunConfig
from rlcore.device import Backend

FULL = {"fp32": torch.float32}
LOW = {"bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setup:
    """Inputs of a section."""

    config: RunConfig
    backend: Backend
    folder: Path  # its own, empty

    @property
    def device(self) -> torch.device:
        return self.backend.device(0)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """fp32 always; bf16 if the run file asks for it, or under auto if it is the device's default."""
        asked = self.config.model.precision
        return FULL | (LOW if (self.backend.default_precision() if asked == "auto" else asked) == "bf16" else {})


def write(setup: Setup, name: str, pipe: str) -> None:
    """Write a section's measurements, a line of JSON each, as soon as they are made."""
    with os.fdopen(int(pipe), "w", encoding="utf-8") as lines:
        for measurement in import_module(f"rlcore.diagnose.conformance.{name}").measure(setup):
            print(json.dumps(asdict(measurement)), file=lines, flush=True)


def main(settings: str, folder: str, function: str, *arguments: str) -> None:
    config = RunConfig.model_validate_json(settings)
    kind = registry.load("backends", config.backend.name)
    backend = kind(validate(kind.Options, config.backend.options, "backend.options."))
    backend.prepare()
    module, _, name = function.rpartition(".")
    getattr(import_module(f"rlcore.diagnose.conformance.{module}"), name)(Setup(config, backend, Path(folder)), *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
