"""Accessors of vLLM's private objects, and when each can go. Read from vLLM 0.32.

New reach-ins belong here. `runner` is vLLM's model runner. Three places keep their own, next to what needs them: rollout.py
drives `llm_engine` request by request (until `LLM` yields requests as they finish, has `reset_encoder_cache` and `add_lora`);
manifest.py reads attributes of served layers (until vLLM has a public map from checkpoint names to the shard of a parameter,
and packed CPU layers keep a weight that can be read); engine.py asks attention layers for kernels of their head size (until
vLLM refuses them when it starts).
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rlcore.distributed.fingerprint import holds_weights
from rlcore.errors import ConfigError

from . import experts

if TYPE_CHECKING:
    from vllm import LLM


def model_runner(llm: LLM) -> Any:
    """vLLM's model runner in this process. Delete when: `LLM.apply_model` serves all that is done with it."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def derives_from_weights(holder: Any) -> bool:
    """Whether an update may change tensors that this layer or object holds: vLLM has layers rearrange their weights after
    loading, and a LoRA update writes the layers that serve LoRA. Delete when: vLLM says which tensors it derives."""
    if "lora" in type(holder).__module__.split("."):
        return True
    rearranges = isinstance(holder, nn.Module) and hasattr(holder, "process_weights_after_loading")
    return holds_weights(holder) or (rearranges and next(holder.parameters(), None) is not None)


def kv_cache_tensors(runner: Any) -> Iterator[Tensor]:
    """Yield the tensors of the key-value cache. Delete when: sleep mode works on every device; the CPU worker ignores it."""
    for cache in runner.kv_caches:
        yield from cache if isinstance(cache, list | tuple) else [cache]


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the process's random state on exit: vLLM seeds every generator, and the trainer's draws must not depend on it."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def clear_scratch(runner: Any) -> None:
    """Zero what Qwen3-VL adds to the hidden states of tokens that are of no image. A sleep that discards the weights discards
    it too, and nothing else writes all of it again. Delete when: vLLM's level 2 keeps `deepstack_input_embeds`."""
    with torch.inference_mode():
        for tensor in getattr(runner.get_model(), "deepstack_input_embeds", None) or ():
            tensor.zero_()


def sleep_mode(llm: LLM) -> bool:
    """Whether vLLM's sleep mode is on. Delete when: `LLM` says so."""
    return llm.llm_engine.vllm_config.model_config.enable_sleep_mode


def reload_weights(llm: LLM, runner: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Load weights in place. Delete when: vLLM's weight-transfer API takes tensors of the calling process."""
    forget_kernels(runner)
    with _updating(llm):
        runner.reload_weights(weights_iterator=weights)


def forget_kernels(runner: Any) -> None:
    """Have the next update build the CPU kernels of experts anew.

    Why: vLLM packs experts for them only when it builds them. An update leaves the experts as they came, and the kernel reads
        them as if they were packed, without an error: log-probabilities are off by 1 or 2.
    Delete when: `UnquantizedFusedMoEMethod._setup_kernel` has `fused_experts` process the weights of an update too.
    """
    for _, layer in experts.layers(runner.get_model()):
        if layer.quant_method.unquantized_backend.name == "CPU":
            layer.quant_method.moe_kernel = None


def abandon_reload(llm: LLM, runner: Any) -> None:
    """Leave a half-done update, so that a full one can follow. Delete when: `reload_weights` cleans up after an error."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    with contextlib.suppress(Exception), _updating(llm):
        finalize_layerwise_reload(runner.get_model(), runner.model_config)


def lora_layers(runner: Any) -> dict[str, Any]:
    """Layers that serve LoRA, by name. Delete when: vLLM reports checksums of a LoRA slot."""
    return runner.lora_manager._adapter_manager.modules


@contextlib.contextmanager
def _updating(llm: LLM) -> Iterator[None]:
    """Set the engine's configuration, as vLLM's own worker does: layers ask for it while they load weights."""
    from vllm.config import set_current_vllm_config

    with torch.no_grad(), set_current_vllm_config(llm.llm_engine.vllm_config):
        yield


def unname_shared_memory() -> None:
    """Unlink the shared memory of vLLM's tensor-parallel processes on AVX-512 CPUs, once all have opened it.

    Why: with `env://` rendezvous the name is the same in every run, and vLLM must create it: what a killed run leaves behind
        keeps every later engine of this machine from starting ("create shm in SHMManager failed. errno: 17").
    Delete when: vLLM's cpu_worker.py makes VLLM_DIST_IDENT of more than `env://`.
    """
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    module = getattr(group.device_communicator, "dist_module", None)
    if name := getattr(module, "group_name", None):
        Path("/dev/shm", f"{name.lstrip('/')}_{group.rank_in_group}").unlink(missing_ok=True)


def register_class(folder: Path) -> None:
    """Register the model's class with vLLM in this process.

    Otherwise vLLM inspects it in a subprocess, which takes some ten seconds and dies where torchvision needs its cure.
    Delete when: vLLM inspects classes without a subprocess.
    """
    from vllm import ModelRegistry

    for architecture in json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ():
        if architecture in ModelRegistry.models:
            ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def check_heads(model: nn.Module) -> None:
    """ConfigError for attention head sizes that vLLM accepts at startup but has no kernel for."""
    for layer in model.modules():
        kind = getattr(layer, "attn_backend", None)  # a vision tower's is only a name: other kernels serve it
        if isinstance(kind, type) and not kind.supports_head_size(size := layer.head_size):
            known = ", ".join(map(str, kind.get_supported_head_sizes()))
            raise ConfigError(
                f"rollout.engine: vLLM's {kind.get_name()} has no kernel for this model's attention heads of {size} (it has"
                f" {known}); set rollout.engine=torch"
            )
