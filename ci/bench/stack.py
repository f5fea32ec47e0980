"""The cpu stack as `rlcore grpo` starts it, and the model of most benchmarks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rlcore import registry
from rlcore.config.sections import ModelConfig


def backend() -> Any:
    kind = registry.load("backends", "cpu")
    return kind(kind.Options())


def start() -> None:
    """Call before torch is imported."""
    own = backend()
    own.settle(os.environ)
    own.prepare()


def smollm2() -> tuple[Path, Any]:
    """Its folder and its model family."""
    from rlcore.model.loading import family_of, resolve
    from rlcore.model.resolved import MODEL_CACHE

    source = ModelConfig(path="smollm2")
    folder = resolve(source, MODEL_CACHE)
    return folder, family_of(folder, source)
