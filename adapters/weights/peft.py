"""Adapter folders of the peft library: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from rlcore.errors import ConfigError
from rlcore.weights.format import Content, Word, content_of
from rlcore.weights.lora import Adapter, merged, separated
from rlcore.weights.output import Draft
from rlcore.weights.safetensors_files import open_file, open_folder, write_file
from rlcore.weights.tensors import Weights, selected

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


class Peft:
    """A LoRA adapter beside its base model."""

    words: ClassVar[Mapping[str, Word]] = {}

    def read(self, source: Path, base: Path | None) -> Content:
        """The base model with the adapter merged. Its folder is --base, or the one that adapter_config.json names."""
        options = _options(source)
        base = base or _named(options, source)
        content = content_of(open_folder(base), base, base)
        plain, factors = separated(open_file(source / MODEL))
        if plain.specs:
            name = next(iter(plain.specs))
            raise ConfigError(f"{source / MODEL}: {name} is no LoRA factor; merge it with peft before converting")
        adapter = Adapter(factors, float(options.get("lora_alpha", 8)), options)
        weights = merged(content.weights, adapter, content.model, str(source))
        return Content(weights, content.model, adapter, content.untied)

    def write(self, content: Content, draft: Draft) -> Weights:
        """The adapter alone, in its own precision."""
        if content.adapter is None:
            raise ConfigError("TO: the checkpoint has no LoRA weights to keep apart; convert it to huggingface")
        factors = content.adapter.factors
        draft.require(factors.nbytes)
        named = selected(factors, {f"{_PREFIX}{name}": name for name in factors.specs})
        write_file(draft.folder / MODEL, list(named.specs), named)
        config = json.dumps(_config(content.adapter, content.model.folder), indent=2) + "\n"
        (draft.folder / CONFIG).write_text(config, encoding="utf-8")
        return separated(open_file(draft.folder / MODEL))[1]


def _options(source: Path) -> dict[str, Any]:
    path = source / CONFIG
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not the config of an adapter: {error}") from None
    if options.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type is {options.get('peft_type')!r}; only LORA can be merged")
    return options


def _named(options: Mapping[str, Any], source: Path) -> Path:
    named = Path(str(options.get("base_model_name_or_path") or ""))
    if not named.is_absolute() or not named.is_dir():
        raise ConfigError(f"--base: {source / CONFIG} names {str(named)!r}, which is no folder here; give the base model's")
    return named


def _config(adapter: Adapter, base: Path) -> dict[str, Any]:
    """adapter_config.json: as it came, or of a plain LoRA on exactly these layers."""
    if adapter.options:
        return {**adapter.options, "base_model_name_or_path": str(base)}
    layers = adapter.layers
    ranks = {layer: adapter.rank(layer) for layer in layers}
    rank = max(ranks.values(), key=list(ranks.values()).count)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "bias": "none",
        "r": rank, "lora_alpha": adapter.alpha, "lora_dropout": 0.0, "inference_mode": True, "init_lora_weights": True,
        "fan_in_fan_out": False, "target_modules": layers,
        "rank_pattern": {f"^{re.escape(layer)}": size for layer, size in ranks.items() if size != rank},
    }  # fmt: skip
