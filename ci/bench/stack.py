"""The cpu stack as `rlcore grpo` starts it, and the model of most benchmarks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rlcore import registry
from rlcore.config.sections import ModelConfig

_SMOLLM2 = ModelConfig(path="smollm2")


def backend() -> Any:
    kind = registry.load("backends", "cpu")
    return kind(kind.Options())


def start() -> None:
    """Call before torch is imported."""
    own = backend()
    own.apply_environment(os.environ)
    own.prepare()


def smollm2_folder() -> Path:
    """Its folder."""
    from rlcore.model.loading import resolve
    from rlcore.model.resolved import MODEL_CACHE

    return resolve(_SMOLLM2, MODEL_CACHE)


def smollm2() -> tuple[Path, Any]:
    """Its folder and its model family."""
    from rlcore.model.loading import family_of

    folder = smollm2_folder()
    return folder, family_of(folder, _SMOLLM2)
