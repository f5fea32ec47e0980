"""vLLM serving LoRA over base weights that it loaded itself: a weight sync sends two small matrices per layer."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from rlcore.config.sections import LoraConfig
from rlcore.distributed.fingerprint import compare, fingerprint
from rlcore.errors import RunError
from rlcore.protocols import ModelFamily
from rlcore.runtime.memory import awake
from rlcore.types import NamedTensors, Receipt

from .internals import lora_layers
from .manifest import locate
from .rollout import VllmRollout

if TYPE_CHECKING:
    from vllm import LLM

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values vLLM accepts for max_lora_rank
_PREFIX = "base_model.model."  # peft's


def engine_arguments(lora: LoraConfig) -> dict[str, Any]:
    """Engine arguments for LoRA of this rank."""
    room = next((rank for rank in _RANKS if rank >= lora.rank), lora.rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


class VllmLoraRollout(VllmRollout):
    """Serves the model of its folder plus the LoRA weights of the latest `load_weights`."""

    def __init__(
        self, llm: LLM, family: ModelFamily, beat: Callable[[], None], sleep_level: int, dtype: Any, lora: LoraConfig
    ) -> None:
        super().__init__(llm, family, beat, min(sleep_level, 1))  # base weights are never sent again
        self._dtype, self._lora = dtype, lora
        self._folder = tempfile.TemporaryDirectory(prefix="rlcore-lora-")

    def load_weights(self, weights: NamedTensors, version: int) -> Receipt:
        """`weights` are the LoRA weights alone. RunError names those that the engine refused or does not hold."""
        from vllm.lora.request import LoRARequest

        awake(self._asleep, "a weight update")
        started = time.perf_counter()
        self._constants.note()
        noting = time.perf_counter() - started
        self.version = None  # until what arrived has been verified
        tensors = {name: tensor.detach().to(self._dtype).contiguous().cpu() for name, tensor in weights}
        self._write(tensors)
        request = LoRARequest("policy", 1, self._folder.name, load_inplace=True)
        try:
            self._llm.llm_engine.add_lora(request)
        except Exception as error:
            raise RunError(f"weight sync: the engine refused the LoRA weights of version {version}: {error!r}") from error
        self._forget()
        checking = time.perf_counter()
        scale = self._lora.alpha / self._lora.rank
        sent = {name: fingerprint(tensor * scale if ".lora_B." in name else tensor) for name, tensor in tensors.items()}
        held = {name: self._held(name, tensor) for name, tensor in tensors.items()}
        compare(sent, {name: fingerprint(tensor) for name, tensor in held.items() if tensor is not None})
        self._check_update(version)
        self._request, self.version = request, version
        done = time.perf_counter()
        size = sum(tensor.nbytes for tensor in tensors.values())
        return Receipt(version, len(sent), size, done - started, noting + done - checking)

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write peft's files, the form in which vLLM takes LoRA."""
        targets = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors})
        settings = {"peft_type": "LORA", "r": self._lora.rank, "lora_alpha": self._lora.alpha, "target_modules": targets}
        folder = Path(self._folder.name)
        (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
        save_file({_PREFIX + name: tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")

    def _held(self, name: str, like: Tensor) -> Tensor | None:
        """The LoRA matrix in the engine's only slot, without padding to the maximum rank; None where it has no such layer."""
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        layers = lora_layers(self._runner)
        slot = locate(self._runner.get_model(), f"{layer}.weight", layers.__contains__)
        if slot.layer not in layers:
            return None
        owner = layers[slot.layer]
        stacked = owner.lora_a_stacked if kind == "lora_A" else owner.lora_b_stacked
        return stacked[slot.index][0, 0, : like.shape[0], : like.shape[1]].contiguous()
