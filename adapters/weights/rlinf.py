"""Checkpoints of RLinf's FSDP workers: `full_weights.pt`, a whole state dict, or a distributed checkpoint (DCP).

    checkpoints/global_step_N/actor/model_state_dict/full_weights.pt
    checkpoints/global_step_N/actor/dcp_checkpoint/{.metadata,*.distcp}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from rlcore.errors import ConfigError
from rlcore.weights import distributed
from rlcore.weights.format import Content, Word, nothing, trained_content
from rlcore.weights.lora import Adapter
from rlcore.weights.pickles import open_pickle
from rlcore.weights.tensors import Weights

_PLACES = ("model_state_dict/full_weights.pt", "model_state_dict/full_weigths.pt", "dcp_checkpoint")  # the second: of old
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _dtype(name: Any) -> Mapping[str, Any]:
    return {} if name is None else {"dtype": _DTYPES.get(name, name)}


def _merge(wanted: Any) -> Mapping[str, Any]:
    return {} if wanted else {"to": "peft"}


class RLinf:
    """A trained model, LoRA merged; converted to `peft`, LoRA kept apart."""

    words: ClassVar[Mapping[str, Word]] = {
        "convertor.ckpt_path": "input", "convertor.save_path": "output", "convertor.merge_lora_weighs": _merge,
        "convertor.merge_lora_weights": _merge, "convertor.torch_dtype": _dtype, "model.model_path": "base",
        "model.model_type": "from.model_type", "model.is_lora": "from.is_lora", "model.lora_rank": "from.lora_rank",
        "ckpt_path": "input", "save_path": "output", "model_path": "base", "config-path": nothing, "config-name": nothing,
    }  # fmt: skip

    def read(
        self, source: Path, base: Path | None, *, model_type: str | None = None, is_lora: bool | None = None,
        lora_rank: int | None = None, alpha: float | None = None,
    ) -> Content:  # fmt: skip
        """`alpha` of LoRA; default: its rank, as RLinf trains it. ConfigError where `model_type` is not the base model's, or
        there are (no) LoRA weights against `is_lora`."""
        place = _place(source)
        weights = distributed.open_folder(place)[0] if place.is_dir() else open_pickle(place)
        content = trained_content(weights, base, place, lambda factors: _adapter(factors, lora_rank, alpha, place))
        _check(content, model_type, is_lora, place)
        return content


def _place(source: Path) -> Path:
    """The weights in a checkpoint folder, its actor's folder, or themselves."""
    if source.is_file() or (source / distributed.METADATA).is_file():
        return source
    for folder in (source, source / "actor"):
        for place in _PLACES:
            if (folder / place).exists():
                return folder / place
    remedy = "give the folder global_step_N, or one of them"
    raise ConfigError(f"--input: {source} has neither {_PLACES[0]} nor {_PLACES[2]}/; {remedy}")


def _adapter(factors: Weights, rank: int | None, alpha: float | None, where: Path) -> Adapter:
    ranks = sorted({spec.shape[0] for name, spec in factors.specs.items() if name.endswith(".lora_A.weight")})
    if not ranks or (rank is not None and ranks != [rank]):
        raise ConfigError(f"{where}: LoRA of rank {ranks}, not [{rank}]; correct model.lora_rank or leave it out")
    if alpha is None and len(ranks) > 1:
        raise ConfigError(f"from.alpha: {where} has LoRA of ranks {ranks}; say its alpha")
    return Adapter(factors, float(ranks[0] if alpha is None else alpha))


def _check(content: Content, model_type: str | None, is_lora: bool | None, where: Path) -> None:
    ours = content.model.config.model_type
    if model_type is not None and model_type.replace(".", "_") not in (ours, f"{ours}_5"):
        raise ConfigError(f"model.model_type: {model_type}, but {content.model.folder / 'config.json'} says {ours}")
    if is_lora is not None and is_lora != (content.adapter is not None):
        found = "no LoRA weights" if is_lora else "LoRA weights"
        raise ConfigError(f"model.is_lora: {is_lora}, but {where} has {found}; correct it or leave it out")
