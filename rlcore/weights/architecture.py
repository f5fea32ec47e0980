"""What a model's weights must be: names and shapes from its config.json alone, in every naming era of transformers.

A model has two sets of names: those of its files (the hub's) and those of the module in memory. They differ where transformers
renamed modules later (Qwen2-VL, Qwen2.5-VL) or fuses tensors when it loads them (mixtures of experts); transformers' own
reverse mapping, which `save_pretrained` uses, leads from the second to the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from rlcore.errors import ConfigError

_WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_RECOMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.masked_bias$")  # buffers that old versions saved


@dataclass(frozen=True)
class Architecture:
    """A model class and its config, without weights."""

    folder: Path  # the base model's
    model: Any  # on the meta device

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def text_config(self) -> Any:
        return self.model.config.get_text_config()

    @cached_property
    def in_memory(self) -> dict[str, Tensor]:
        """Meta tensors by their names in the module, tied ones included."""
        return self.model.state_dict()

    @cached_property
    def expected(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by the hub's names, tied tensors included."""
        return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(self.model, self.in_memory).items()}

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """Hub's names of tensors that share another's values -> that other."""
        pairs = dict(self.model.all_tied_weights_keys)
        return {self.hub_name(target): self.hub_name(source) for target, source in pairs.items()}

    @cached_property
    def module_names(self) -> Mapping[str, str]:
        """Names in the module by the hub's names, for tensors that are the same in both."""
        both = ((list(self._reverted(name, tensor)), name) for name, tensor in self.in_memory.items())
        return {hub[0]: name for hub, name in both if len(hub) == 1}

    def hub_name(self, name: str) -> str:
        (hub,) = self._reverted(name, self.in_memory[name])
        return hub

    def hub(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensor under the hub's names, or its parts; under its own name where the model has no such tensor, and empty for
        a buffer that the model computes."""
        name = _WRAPPERS.sub("", name)
        if name in self.expected:
            return {name: tensor}
        if name in self.in_memory and tensor.shape == self.in_memory[name].shape:
            return self._reverted(name, tensor)
        return {} if _RECOMPUTED.search(name) else {self._renamed(name): tensor}

    def _renamed(self, name: str) -> str:
        """The hub's name of a tensor whose shape is wrong, so that it is reported as that."""
        hub = list(self._reverted(name, self.in_memory[name])) if name in self.in_memory else []
        return hub[0] if len(hub) == 1 else name

    def _reverted(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        return dict(revert_weight_conversion(self.model, {name: tensor}))


def architecture(folder: Path) -> Architecture:
    """The architecture that config.json in `folder` describes; ConfigError when transformers has none such."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json in it; give the model's Hugging Face folder as --base")
    try:
        config = AutoConfig.from_pretrained(folder)
        vision = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        kind: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        with init_empty_weights(include_buffers=False):
            return Architecture(folder, kind.from_config(config))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: transformers has no model for its config.json: {' '.join(str(error).split())}") from None
