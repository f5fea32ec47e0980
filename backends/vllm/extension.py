"""Worker extension of a vLLM server: `vllm serve --worker-extension-cls rlcore_backends.vllm.extension.Extension`.

Its methods are targets of vLLM's POST /collective_rpc, so arguments and results are JSON. An error of ours is a result too,
{"fault": message}: vLLM would hide it in a status 500.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlcore.distributed.fingerprint import Constants
from rlcore.errors import RlcoreError
from rlcore.runtime.memory import OffloadedTensors

from . import experts
from .internals import check_heads, derives_from_weights, forget_kernels, kv_cache_tensors
from .manifest import WeightManifest, WeightTransfer

_REMEDY = "this version of the engine cannot be updated with this model: set rollout.engine=torch, or install another"


def _answered(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(method)
    def answer(*arguments: Any, **named: Any) -> dict[str, Any]:
        try:
            return method(*arguments, **named)
        except RlcoreError as error:
            return {"fault": str(error)}

    return answer


class Extension:
    """Mixed into vLLM's worker, whose attributes it uses. vLLM wants names that the worker has not."""

    model_runner: Any
    vllm_config: Any
    weight_transfer_engine: Any

    @_answered
    def rlcore_report(self) -> dict[str, Any]:
        """Settings that the trainer depends on, once the model's heads have a kernel."""
        config, model = self.vllm_config, self.vllm_config.model_config
        check_heads(self.model_runner.get_model())
        experts.check(self.model_runner.get_model())
        return {
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "logprobs_mode": str(model.logprobs_mode),
            "transfer": getattr(config.weight_transfer_config, "backend", None),
            "images": model.multimodal_config and model.multimodal_config.mm_processor_kwargs,
            "embeds": bool(model.multimodal_config and model.multimodal_config.enable_mm_embeds),
            "vocabulary": model.get_vocab_size(),
            "model": _plain(model.hf_config.to_dict()),
            "workers": config.parallel_config.world_size,
        }

    @_answered
    def rlcore_announce(self, version: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """An update to `version` follows; `shapes` of the tensors in the trainer's model folder."""
        model = self.model_runner.get_model()
        if not hasattr(self, "_rlcore_constants"):
            self._rlcore_constants = Constants(model, kv_cache_tensors(self.model_runner), derives_from_weights)
            self._rlcore_manifest = WeightManifest(model, self.vllm_config.model_config.dtype, shapes)
        started = time.perf_counter()
        self._rlcore_constants.note()
        self._rlcore_checking = time.perf_counter() - started
        self._rlcore_update: WeightTransfer = self._rlcore_manifest.transfer(version)
        self.weight_transfer_engine.watching = self._rlcore_update
        forget_kernels(self.model_runner)
        return {}

    @_answered
    def rlcore_receipt(self, version: int) -> dict[str, Any]:
        """Verify that the engine holds what was sent to it, and nothing else changed."""
        update = self._rlcore_update
        self._rlcore_manifest.serve_tied_heads()
        started = time.perf_counter()
        update.verify()
        self._rlcore_constants.check(f"the update to version {version}", _REMEDY, updated=True)
        checking = self._rlcore_checking + update.seconds + time.perf_counter() - started
        return {"tensors": update.tensors, "bytes": update.bytes, "check_seconds": checking}

    @_answered
    def rlcore_free_cache(self) -> dict[str, Any]:
        """Free the key-value cache."""
        self._rlcore_cache().pause()
        return self._rlcore_bytes()

    @_answered
    def rlcore_restore_cache(self) -> dict[str, Any]:
        """Also where an earlier run left it freed; does nothing where it is there."""
        self._rlcore_cache().resume()
        return self._rlcore_bytes()

    def _rlcore_cache(self) -> OffloadedTensors:
        if not hasattr(self, "_rlcore_offloaded"):
            self._rlcore_offloaded = OffloadedTensors(lambda: kv_cache_tensors(self.model_runner), keep=False)
        return self._rlcore_offloaded

    def _rlcore_bytes(self) -> dict[str, Any]:
        cache = self._rlcore_cache().device_bytes()
        weights = {tensor.data_ptr(): tensor.nbytes for tensor in self.model_runner.get_model().state_dict().values()}
        return {"bytes": cache + sum(weights.values())}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and switches of a model's configuration, and of its parts."""
    kept = {name: _plain(value) if isinstance(value, Mapping) else value for name, value in config.items()}
    return {name: value for name, value in kept.items() if isinstance(value, int | dict)}
