"""Weight sync of all weights, verified on the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from rlcore.errors import RunError
from rlcore.protocols import ModelFamily
from rlcore.runtime.memory import awake
from rlcore.types import NamedTensors, Receipt

from .internals import abandon_reload, reload_weights
from .manifest import WeightManifest
from .rollout import VllmRollout

if TYPE_CHECKING:
    from vllm import LLM


class VllmWeightsRollout(VllmRollout):
    """Takes full weight updates, and verifies that the engine holds them."""

    def __init__(
        self, llm: LLM, family: ModelFamily, beat: Callable[[], None], sleep_level: int, dtype: torch.dtype,
        shapes: Mapping[str, Sequence[int]],
    ) -> None:  # fmt: skip
        super().__init__(llm, family, beat, sleep_level)
        self._manifest = WeightManifest(self._runner.get_model(), dtype, shapes)

    def load_weights(self, weights: NamedTensors, version: int) -> Receipt:
        """Update in place and verify. RunError names the tensors that are missing, unknown or not what was sent."""
        awake(self._asleep, "a weight update")
        started = time.perf_counter()
        self._constants.note()
        checking = time.perf_counter() - started
        transfer = self._manifest.transfer(version)
        self.version = None  # until what arrived has been verified
        try:
            reload_weights(self._llm, self._runner, transfer.watch(weights))
        except Exception as error:
            abandon_reload(self._llm, self._runner)
            if isinstance(error, RunError):
                raise
            last = transfer.last or "the first tensor"
            raise RunError(f"weight sync: the engine refused version {version} at {last}: {error!r}") from error
        self._manifest.serve_tied_heads()
        self._forget()
        began = time.perf_counter()
        transfer.verify()
        self._check_update(version)
        self.version = version
        done = time.perf_counter()
        checking += transfer.seconds + done - began
        return Receipt(version, transfer.tensors, transfer.bytes, done - started, checking)

    def _packed_bytes(self) -> int:
        return self._manifest.packed_bytes()
