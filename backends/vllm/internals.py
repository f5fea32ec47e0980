"""The place for reach-ins into vLLM's private objects: accessors that several modules share, and a table of every reach-in.

New reach-ins belong here; those that still stand elsewhere name their module. `runner` is vLLM's model runner, `llm_engine` is
`LLM.llm_engine`, `model` and `layer` are the served modules. Read from vLLM 0.32.

| reach-in (module)                               | for                                    | Delete when
| ----------------------------------------------- | -------------------------------------- | -----------------------------------
| llm_engine.model_executor.driver_worker.worker  | model runner of this process           | the `runner` rows below are gone
|   .model_runner (here)                          |                                        |
| runner.get_model() (rollout, engine, weights,   | served modules: fingerprints,          | `LLM.apply_model` (public in 0.32)
|   lora)                                         |   manifest, head sizes, device bytes   |   serves, with every version used
| runner.kv_caches (here)                         | offloading the key-value cache without | sleep mode works on every device;
|                                                 |   sleep mode                           |   the CPU worker of 0.32 ignores it
| runner.reload_weights(weights_iterator=)        | in-place update from the actor's own   | the weight-transfer API takes
|   (weights)                                     |   tensors                              |   tensors of the calling process
| finalize_layerwise_reload, runner.model_config  | leaving an update that raised, so that | `reload_weights` cleans up after an
|   (weights)                                     |   the next one can start               |   error; 0.32 does not
| llm_engine.vllm_config, set_current_vllm_config | whether sleep mode is on; the          | `reload_weights` sets it itself
|   (engine, weights)                             |   configuration that layers ask for as |
|                                                 |   they load                            |
| llm_engine.add_request, step, abort_request,    | a heartbeat at each step, each group   | `LLM` yields finished requests
|   has_unfinished_requests (rollout)             |   as soon as it is finished            |
| llm_engine.reset_encoder_cache (rollout)        | dropping image features of old weights | `LLM` has it, as it has
|                                                 |                                        |   `reset_prefix_cache`
| llm_engine.add_lora (lora)                      | LoRA weight sync                       | `LLM` has it
| runner.lora_manager._adapter_manager.modules,   | reading LoRA weights back, to compare  | vLLM reports checksums of a slot
|   layer.lora_a_stacked, lora_b_stacked (lora)   |   them with what was sent              |
| model.hf_to_vllm_mapper, packed_modules_mapping | Hugging Face name -> parameter and     | vLLM has a public map from
|   (manifest)                                    |   index in a fused layer               |   checkpoint names to parameters
| layer.tp_rank, tp_size, output_sizes,           | this rank's shard of a sent tensor     | that map has shards too
|   shard_indices, num_kv_head_replicas           |                                        |
|   (manifest)                                    |                                        |
| layer.quant_method, embedding_dim, input_size,  | probing layers whose weight is packed  | packed CPU layers keep a weight
|   input_size_per_partition,                     |   for oneDNN, and counting their bytes |   that can be read
|   output_size_per_partition (manifest)          |                                        |
| layer.cpu_linear (manifest)                     | serving a tied head after an update    | vLLM's reload repacks tied heads
| layer.process_weights_after_loading, modules in | finding tensors that an update may     | vLLM says which tensors loading
|   `lora` packages (here)                        |   rewrite                              |   derives from weights
| layer.attn_backend, head_size (engine)          | refusing head sizes without a kernel   | vLLM refuses them when it starts
| get_tp_group().rank_in_group,                   | unlinking the name of shared memory    | see `engine._unname_shared_memory`
|   .device_communicator.dist_module.group_name   |   that a killed run would leave behind |
|   (engine)                                      |                                        |
| ModelRegistry.models (engine)                   | loading the model's class in this      | vLLM inspects classes without a
|                                                 |   process                              |   subprocess
| global random state (here)                      | undoing vLLM's seeding of every        | vLLM seeds generators of its own
|                                                 |   generator                            |
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rlcore.distributed.fingerprint import holds_weights

if TYPE_CHECKING:
    from vllm import LLM


def model_runner(llm: LLM) -> Any:
    """vLLM's model runner in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def derives_from_weights(holder: Any) -> bool:
    """Whether an update may change tensors that this layer or object holds: vLLM has layers rearrange their weights after
    loading, and a LoRA update writes the layers that serve LoRA."""
    if "lora" in type(holder).__module__.split("."):
        return True
    rearranges = isinstance(holder, nn.Module) and hasattr(holder, "process_weights_after_loading")
    return holds_weights(holder) or (rearranges and next(holder.parameters(), None) is not None)


def kv_cache_tensors(runner: Any) -> Iterator[Tensor]:
    """Yield the tensors of the key-value cache."""
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
