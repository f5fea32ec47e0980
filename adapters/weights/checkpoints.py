"""Our own checkpoints (rlcore/checkpoint/folder.py): a model folder `model/`, and `lora.safetensors` where LoRA was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from rlcore.checkpoint.folder import newest_checkpoint
from rlcore.errors import ConfigError
from rlcore.weights.format import Content, Word, content_of
from rlcore.weights.lora import Adapter
from rlcore.weights.output import Draft
from rlcore.weights.safetensors_files import open_file, open_folder, write_file
from rlcore.weights.tensors import Weights, joined

from .huggingface import write_model

LORA = "lora.safetensors"


class Checkpoints:
    """A checkpoint `step_N`, or a run folder for its latest one. LoRA is merged in `model/` already."""

    words: ClassVar[Mapping[str, Word]] = {}

    def read(self, source: Path, base: Path | None, *, alpha: float | None = None) -> Content:
        """`alpha` of LoRA; default: the run's own."""
        folder = source if (source / "model").is_dir() else newest_checkpoint(source)
        if folder is None or not (folder / "model").is_dir():
            found = f"{source} is neither a checkpoint (model/) nor a run folder with one (checkpoints/latest)"
            raise ConfigError(f"--input: {found}")
        content = content_of(open_folder(folder / "model"), base or folder / "model", folder)
        if not (folder / LORA).is_file():
            return content
        adapter = Adapter(open_file(folder / LORA), _alpha(folder) if alpha is None else alpha)
        return Content(content.weights, content.model, adapter, content.untied)

    def write(self, content: Content, draft: Draft) -> Weights:
        """What `--model` and `model.path` take; a run cannot resume from it, since it has no optimizer."""
        written = write_model(content, draft.folder / "model", draft)
        if content.adapter is None:
            return written
        factors = content.adapter.factors
        write_file(draft.folder / LORA, list(factors.specs), factors)
        return joined(written, open_file(draft.folder / LORA))


def _alpha(folder: Path) -> float:
    """model.lora.alpha of the run that the checkpoint is in."""
    path = folder.parent.parent / "config.yaml"
    try:
        config: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return float(config["model"]["lora"]["alpha"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        remedy = f"{LORA} needs it; give model.lora.alpha of the run"
        raise ConfigError(f"from.alpha: {path} does not say it, and {remedy}") from None
