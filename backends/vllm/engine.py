"""Start vLLM in this process, with the engine arguments common to all runs."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from rlcore.config.sections import LoraConfig, RolloutConfig
from rlcore.device import Backend
from rlcore.errors import ConfigError, OutOfMemory, PluginError, RlcoreError, Shortage, nearest
from rlcore.monitor.heartbeat import no_heartbeat
from rlcore.protocols import ModelFamily

from .experts import check as check_experts
from .internals import check_heads, model_runner, preserved_random_state, register_class, sleep_mode, unname_shared_memory
from .relief import Relief
from .rollout import VllmRollout
from .weights import VllmWeightsRollout

if TYPE_CHECKING:
    from vllm import LLM

_IMAGES_A_PROMPT = 16
_LEAST_TEMPERATURE = 0.01  # vLLM's SamplingParams raise lower ones to this


@contextmanager
def _uncollected() -> Iterator[None]:
    """Importing vLLM makes objects by the million, all of which stay: looking through them for garbage meanwhile takes a
    quarter of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_uncollected()
def build(
    family: ModelFamily,
    folder: Path,
    backend: Backend,
    config: RolloutConfig,
    dtype: torch.dtype,
    max_tokens: int,
    seed: int,
    lora: LoraConfig | None = None,
    beat: Callable[[], None] = no_heartbeat,
    image_embeds: bool = False,
    temperatures: Mapping[str, float] | None = None,
    experts: bool = False,
) -> VllmRollout:
    """Start an engine that serves `folder`. `config.options` are vLLM's own engine arguments and override ours."""
    if importlib.util.find_spec("vllm") is None:
        raise PluginError(
            f"rollout.engine: vllm is not installed; pip install -r {backend.environment_requirements}"
            " or set rollout.engine=torch"
        )
    _collect_earlier()
    defaults = common_arguments(folder, dtype, max_tokens, seed) | dict(backend.engine_options("vllm"))
    defaults |= image_arguments(folder, family.image_options, image_embeds)
    if distributed.is_initialized():
        defaults |= _one_of_many(config.tensor_parallel)
    refuse_raised(temperatures or {})
    refuse_experts(experts)
    _refuse_unknown(config.options)
    _refuse_executor(config.options)
    if lora:
        from .lora import engine_arguments

        defaults |= engine_arguments(lora)
    with preserved_random_state():
        from vllm import LLM

        register_class(folder)
        arguments = defaults | config.options
        relief = Relief(arguments, config.options, backend, max_tokens)
        try:
            llm = LLM(**arguments)
        except Exception as error:
            if (failure := _start_failure(error, relief)) is None:
                raise
            raise failure from error
        if config.tensor_parallel > 1:
            unname_shared_memory()
        check_heads(model_runner(llm).get_model())
        check_experts(model_runner(llm).get_model())
        level = _sleep_level(llm, backend)
        if lora:
            from .lora import VllmLoraRollout

            rollout: VllmRollout = VllmLoraRollout(llm, family, beat, level, dtype, lora)
        else:
            rollout = VllmWeightsRollout(llm, family, beat, level, dtype, file_shapes(folder))
        rollout.relief = partial(relief.savings, llm)
        return rollout


def _start_failure(error: Exception, relief: Relief) -> RlcoreError | None:
    """The error that says what vLLM lacked; None if it says nothing of the kind."""
    if memory := relief.backend.shortage(error):
        said = " ".join(str(error).split())
        return OutOfMemory(Shortage("start_engine", memory, said, relief=tuple(relief.savings())))
    if not isinstance(error, ValueError):
        return None
    shortage = relief.refused(error)
    return OutOfMemory(shortage) if shortage else ConfigError(f"rollout.engine: vLLM refuses to start: {error}")


def _sleep_level(llm: LLM, backend: Backend) -> int:
    """The backend's `sleep_level`, unless rollout.options turned vLLM's sleep mode on (at least 1) or off (0)."""
    level = getattr(backend.options, "sleep_level", 0)
    return (level or 1) if sleep_mode(llm) else 0


def common_arguments(folder: Path, dtype: torch.dtype, max_tokens: int, seed: int) -> dict[str, Any]:
    return {
        "model": str(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_tokens,
        "seed": seed,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "generation_config": "vllm",  # ignore the folder's: all sampling settings are ours
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }


def image_arguments(folder: Path, image_options: Mapping[str, Any], image_embeds: bool) -> dict[str, Any]:
    """Arguments of an engine whose model has a vision tower; images are scaled as the trainer scales them."""
    if "vision_config" not in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return {}
    limits = {"image": _IMAGES_A_PROMPT, "video": 0}
    scaled = {"mm_processor_kwargs": {"images_kwargs": dict(image_options)}} if image_options else {}
    return {"limit_mm_per_prompt": limits, "enable_mm_embeds": image_embeds, **scaled}


def _one_of_many(tensor_parallel: int) -> dict[str, Any]:
    """Arguments of an engine in one rank of an initialized process group, where vLLM reads torchrun's environment variables.
    Each process sees one device."""
    ranks = {"RANK": distributed.get_rank(), "WORLD_SIZE": distributed.get_world_size(), "LOCAL_RANK": 0}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    return {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": tensor_parallel}


def _collect_earlier() -> None:
    """Collect this process's previous engine now, if unreferenced: vLLM destroys the process groups when an engine is
    collected. Later those would be the next engine's, and until then this process looks like one of several ranks."""
    gc.collect()


def file_shapes(folder: Path) -> dict[str, list[int]]:
    """Shape of every tensor in the folder, by name, from the headers of its files."""
    from safetensors import safe_open

    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    return shapes


def refuse_experts(wanted: bool) -> None:
    if wanted:
        raise ConfigError("model.routing_replay: vLLM gives no experts here; set rollout.engine=torch, or remove it")


def refuse_raised(temperatures: Mapping[str, float]) -> None:
    """ConfigError for a temperature that vLLM would raise, unknown to the trainer's log-probabilities."""
    for key, temperature in temperatures.items():
        if 0 < temperature < _LEAST_TEMPERATURE:
            raise ConfigError(
                f"{key}: {temperature} is below {_LEAST_TEMPERATURE}, at which vLLM would sample instead; raise it to that, or"
                " set rollout.engine=torch"
            )


def _refuse_executor(options: Mapping[str, Any]) -> None:
    """ConfigError for an engine in other processes, as under Ray's compiled graphs."""
    if (executor := options.get("distributed_executor_backend")) is not None:
        raise ConfigError(
            f"rollout.options.distributed_executor_backend: {executor!r} would run the engine in other processes, and weights"
            " are loaded and checked in this one; remove it, and set rollout.tensor_parallel for several devices"
        )


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    """ConfigError for an argument that vLLM does not have, or that would part it from the trainer."""
    from vllm import EngineArgs

    known = [field.name for field in dataclasses.fields(EngineArgs)]
    for name in options:
        if name == "mm_processor_kwargs":
            raise ConfigError(
                f"rollout.options.{name}: the engine would read other images than the trainer; set vision.min_pixels and"
                " vision.max_pixels, which hold for both"
            )
        if name not in known:
            hint = nearest(name, known)
            hint = hint if "did you mean" in hint else "; vLLM's engine arguments are what may stand here"
            raise ConfigError(f"rollout.options.{name}: vLLM has no such engine argument{hint}")
