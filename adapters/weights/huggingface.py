"""Hugging Face model folders: safetensors in one file or several; config, tokenizer and processor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from rlcore.weights.format import Content, Word, content_of
from rlcore.weights.output import RECORD, Draft
from rlcore.weights.safetensors_files import open_folder, write_folder
from rlcore.weights.tensors import Weights

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json", RECORD)


class HuggingFace:
    """A folder that `from_pretrained` loads."""

    words: ClassVar[Mapping[str, Word]] = {}

    def read(self, source: Path, base: Path | None) -> Content:
        return content_of(open_folder(source), base or source, source)

    def write(self, content: Content, draft: Draft) -> Weights:
        """Weights, and every file of the base model that holds none."""
        return write_model(content, draft.folder, draft)


def write_model(content: Content, folder: Path, draft: Draft) -> Weights:
    """Write a model folder; returns its weights, read back."""
    draft.require(content.weights.nbytes)
    folder.mkdir(exist_ok=True)
    for file in sorted(content.model.folder.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, folder / file.name)
    _adapt_config(folder / "config.json", content)
    write_folder(folder, content.weights, draft.shard_bytes)
    return open_folder(folder)


def _adapt_config(path: Path, content: Content) -> None:
    """Have config.json say what the weights are, where the base model's says something else: their type, and an untied head."""
    config = json.loads(path.read_text(encoding="utf-8"))
    types = {str(spec.dtype).removeprefix("torch.") for spec in content.weights.specs.values() if spec.dtype.is_floating_point}
    changes: dict[str, Any] = {"tie_word_embeddings": False} if content.untied else {}
    for key in ("dtype", "torch_dtype"):  # the second until transformers 4.56
        if key in config and len(types) == 1 and config[key] not in types:
            changes[key] = next(iter(types))
    for part in (config, config.get("text_config", {})) if changes else ():
        part.update({key: value for key, value in changes.items() if key in part or part is config})
    if changes:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
