"""Settings to try when memory runs out: for each stage a ladder, of which the rungs that apply to this run are given.

The mildest come first: those that cost only time, then those that change what is trained, then more devices. More devices share
weights, gradients and moments; a row's activations are shared by `sharding.sequence_parallel` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from rlcore.config import loader
from rlcore.config.placement import PoolShape
from rlcore.config.schema import RunConfig
from rlcore.device import Backend
from rlcore.errors import ConfigError, Remedy, Shortage
from rlcore.runtime.memory import PHASES

_GIB = 2**30
_ROLES = {"generate": "rollout", "start_engine": "rollout", "receive": "rollout", "embed": "vision"}
_PHASES = {
    "embed": "encode", "generate": "infer", "sync": "reshard", "receive": "reshard", "send": "send",
    "reference_logprobs": "reference", "logprobs": "score", "values": "score", "update": "train", "update_critic": "train",
    "save": "save", "restore": "save",
}  # fmt: skip
_MOVED = ("reference", "optimizer", "engine", "parameters", "vision")  # parts, in the order in which moving them pays off


@dataclass(frozen=True)
class Case:
    """A shortage in a run, and what decides which settings help."""

    shortage: Shortage
    config: RunConfig
    backend: Backend
    heads: int | None = None  # query heads of the model

    @property
    def stage(self) -> str:
        return self.shortage.stage

    @property
    def pool(self) -> PoolShape:
        """Pool of the worker that ran out."""
        role = "reference" if self.stage == "reference_logprobs" else _ROLES.get(self.stage, "actor")
        return self.config.topology.of(role)

    @property
    def own_memory(self) -> bool:
        """Whether the devices have memory of their own, so that the host's is room for more."""
        return self.backend.own_memory

    @property
    def shards(self) -> int:
        """Devices that a copy of the model is sharded over."""
        replicas = self.config.sharding.replicas
        return 1 if replicas == "all" else self.pool.devices // replicas

    @property
    def row(self) -> int:
        """Tokens of the longest packed row there can be, or of the longest there was in the call that failed."""
        return self.shortage.tokens or self.config.train.max_tokens_per_microbatch

    @property
    def least_row(self) -> int:
        """Tokens that a packed row must be able to hold."""
        return max(self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens, self.shortage.longest)


Rung = Callable[[Case], Iterator[Remedy]]


def remedies(case: Case) -> Iterator[Remedy]:
    """The rungs that apply, each with values that make a valid run file."""
    for rung in _ladder(case):
        yield from (remedy for remedy in rung(case) if _valid(case, remedy))


def _ladder(case: Case) -> tuple[Rung, ...]:
    if case.stage not in _LADDERS or (case.shortage.memory == "host" and case.own_memory):
        return _HOST
    return (*_LADDERS[case.stage], *(() if case.own_memory else (_reward_workers,)), _devices)


def changed(config: RunConfig, remedy: Remedy) -> RunConfig:
    """The configuration under the remedy's overrides; ConfigError if they do not go together with the rest."""
    values: dict[str, Any] = config.model_dump(mode="json")
    for override in remedy.overrides:
        values = loader.overridden(values, override)
    return loader.validate(RunConfig, values)


def _valid(case: Case, remedy: Remedy) -> bool:
    try:
        config = changed(case.config, remedy)
        loader.validate(case.backend.Options, config.backend.options, "backend.options.")
    except ConfigError:
        return False
    return True


def _remedy(case: Case, settings: Mapping[str, Any], why: str, **kind: bool) -> Remedy:
    """A remedy that sets these settings; what they are now is looked up."""
    overrides = tuple(f"{key}={_yaml(value)}" for key, value in settings.items())
    now = ", ".join(_yaml(_setting(case.config, key)) for key in settings)
    return Remedy(overrides, now, why, **kind)


def _yaml(value: Any) -> str:
    """A value as an override has it, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _setting(config: RunConfig, key: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


# activations of a forward and backward pass


def _checkpointing(case: Case) -> Iterator[Remedy]:
    if not case.config.train.gradient_checkpointing:
        why = "each layer's activations are computed again in the backward pass instead of kept"
        yield _remedy(case, {"train.gradient_checkpointing": True}, why)


def _microbatch(case: Case) -> Iterator[Remedy]:
    key, row, least = "train.max_tokens_per_microbatch", case.row, case.least_row
    if row <= least:
        return
    data, rollout = case.config.data, case.config.rollout
    floor = f"data.max_prompt_tokens {data.max_prompt_tokens} + rollout.max_new_tokens {rollout.max_new_tokens}"
    if least == case.shortage.longest:
        floor = "the longest of this batch, and no row of the data may be longer"
    longest = f"; the longest row had {row} tokens" if case.shortage.tokens else ""
    why = f"activations grow with the tokens of a forward pass{longest}; {least} is the least that holds a sample ({floor})"
    yield _remedy(case, {key: max(least, row // 2)}, why)


def _sequence(case: Case) -> Iterator[Remedy]:
    """Powers of two only: they divide the heads of most models."""
    key, now = "sharding.sequence_parallel", case.config.sharding.sequence_parallel
    more = 1 << now.bit_length()
    if more <= case.shortage.neighbours and not (case.heads or more) % more:
        limit = f"at most {case.shortage.neighbours}, the devices of this pool on one node"
        yield _remedy(case, {key: more}, f"{more} devices share each row's activations; {limit}")


def _gradients(case: Case) -> Iterator[Remedy]:
    if case.shards > 1 and case.config.sharding.gradient_sync == "last":
        why = "gradients are sharded after each micro-batch, where a whole copy (4 bytes a parameter) is kept until the last"
        yield _remedy(case, {"sharding.gradient_sync": "each"}, why)


def _reshard(case: Case) -> Iterator[Remedy]:
    if case.shards > 1 and not case.config.sharding.reshard_after_forward:
        yield _remedy(case, {"sharding.reshard_after_forward": True}, "a layer's weights are gathered only while it runs")


def _images(case: Case) -> Iterator[Remedy]:
    if (now := case.config.vision.images_per_batch) > 1:
        why = "the vision tower reads that many images in a forward pass"
        yield _remedy(case, {"vision.images_per_batch": max(1, now // 2)}, why)


# weights and what else stays


def _offload(case: Case) -> Iterator[Remedy]:
    """Move parts to the host that the phase does not need. The encoder's phase moves none: what the weight sync before it does
    not need is away by then."""
    phase, config = _PHASES.get(case.stage), case.config
    if phase == "reference" and "reference" not in case.shortage.held:  # it is the actor without its LoRA
        phase = "score"
    if not case.own_memory or phase is None:
        return
    needed = PHASES[phase] | (PHASES["reshard"] - {"engine"} if phase == "encode" else frozenset())
    needed |= {"parameters", "optimizer"} if config.sharding.cpu_offload else frozenset()
    held = {name: case.shortage.held.get(name, 0) for name in _MOVED if name not in needed}
    moved = [name for name, size in held.items() if size and name not in config.placement.offload]
    if moved:
        size = sum(held[name] for name in moved) / _GIB
        why = f"this stage does not need them, and they hold {size:.1f} GiB, which moves to host memory meanwhile"
        yield _remedy(case, {"placement.offload": [*config.placement.offload, *moved]}, why)


def _cpu_offload(case: Case) -> Iterator[Remedy]:
    sharding = case.config.sharding
    whole = case.stage == "load" and (case.config.model.lora or not sharding.meta_init)  # loaded on the device, then sharded
    if case.own_memory and case.pool.devices > 1 and not sharding.cpu_offload and not whole:
        why = "weights, gradients and moments stay in host memory, and each layer visits the device; slow"
        yield _remedy(case, {"sharding.cpu_offload": True}, why)


def _meta_init(case: Case) -> Iterator[Remedy]:
    config = case.config
    if case.shards > 1 and not config.sharding.meta_init and not config.model.lora:
        why = "each device reads only its shard of the weights, where now each reads the whole model in float32"
        yield _remedy(case, {"sharding.meta_init": True}, why)


def _replicas(case: Case) -> Iterator[Remedy]:
    now = case.config.sharding.replicas
    if now == "all" or now > 1:
        why = "each device holds a smaller shard of weights, gradients and moments; more traffic"
        yield _remedy(case, {"sharding.replicas": now // 2 if now != "all" and now % 2 == 0 else 1}, why)


def _lora(case: Case) -> Iterator[Remedy]:
    """While loading, LoRA saves only the reference's copy."""
    compared = case.config.algorithm.kl_coef or case.config.dpo
    if case.config.model.lora is None and (compared or case.stage != "load"):
        copy = "; the reference needs no weights of its own" if compared else ""
        yield _remedy(case, {"model.lora": {"rank": 16}}, f"gradients and moments of small matrices only{copy}", anew=True)


# the engine


def _relief(case: Case) -> Iterator[Remedy]:
    yield from case.shortage.relief


def _paged(case: Case) -> Iterator[Remedy]:
    engine = case.backend.default_engine
    if case.config.rollout.engine == "torch" and engine != "torch":
        why = "the plain sampler's cache grows with samples x tokens; this engine's has a fixed size"
        yield _remedy(case, {"rollout.engine": engine}, why)


def _lengths(case: Case) -> Iterator[Remedy]:
    """Shorten responses, or else prompts, to what the engine's cache could hold."""
    config, fits, prompt = case.config, case.shortage.fits, case.config.data.max_prompt_tokens
    if not fits:
        return
    responses = {"rollout.max_new_tokens": config.rollout.max_new_tokens}
    for (key, own), sampled in zip(config.data.held_out_sets.items(), config.evaluation_sets.values(), strict=False):
        responses[f"{'evaluation' if own.max_new_tokens is None else key}.max_new_tokens"] = sampled.max_new_tokens
    if fits > prompt:
        settings = {key: fits - prompt for key, tokens in responses.items() if tokens > fits - prompt}
    else:
        settings = {"data.max_prompt_tokens": fits - max(responses.values())}
    why = f"the cache has room for {fits} tokens; one sample is data.max_prompt_tokens {prompt} and a whole response"
    yield _remedy(case, settings, why)


def _bucket(case: Case) -> Iterator[Remedy]:
    now = case.config.sharding.bucket_mib
    if now > 64 and (case.shards > 1 or case.config.placement.apart):
        yield _remedy(case, {"sharding.bucket_mib": now // 2}, "so many MiB of weights are gathered at once for the engine")


def _tensor_parallel(case: Case) -> Iterator[Remedy]:
    more = 2 * case.config.rollout.tensor_parallel
    engine = case.config.rollout.engine
    plain = (case.backend.default_engine if engine == "auto" else engine) == "torch"
    if not plain and more <= case.shortage.neighbours and not (case.heads or more) % more:
        yield _remedy(case, {"rollout.tensor_parallel": more}, f"{more} devices share the weights and cache of an engine")


# more of everything


def _devices(case: Case) -> Iterator[Remedy]:
    setting, now, roles = case.pool
    settings: dict[str, Any] = {"placement.kind": "ray"} if case.config.placement.kind == "local" else {}
    copied = "actor" not in roles or case.config.sharding.replicas == "all"
    shared = "the prompts" if copied else "weights, gradients and moments"
    rest = "a row's activations (sharding.sequence_parallel shares those)"
    if case.stage in ("start_engine", "generate", "sync", "receive"):
        rest = "an engine's memory (rollout.tensor_parallel shares that)"
    where = "" if case.own_memory else "; on more machines, since the devices of one have its memory in common"
    yield _remedy(case, settings | {setting: 2 * now}, f"they share {shared}, not {rest}{where}", hardware=True)


# host memory beside that of the devices


def _keep(case: Case) -> Iterator[Remedy]:
    """Stop moving the largest part to the host."""
    away = case.config.placement.offload
    largest = next((name for name in ("optimizer", "parameters", "reference", "vision", "engine") if name in away), None)
    if largest:
        why = f"the host holds what is offloaded: {largest} then stays on the device"
        yield _remedy(case, {"placement.offload": [name for name in away if name != largest]}, why)


def _cpu_offload_off(case: Case) -> Iterator[Remedy]:
    if case.config.sharding.cpu_offload:
        yield _remedy(case, {"sharding.cpu_offload": False}, "weights, gradients and moments are in host memory under it")


def _reward_workers(case: Case) -> Iterator[Remedy]:
    if now := case.config.placement.reward_workers:
        yield _remedy(case, {"placement.reward_workers": now // 2}, "each is a process with imports and data of its own")


_WEIGHTS: tuple[Rung, ...] = (_reshard, _offload, _cpu_offload, _replicas, _lora)
_SCORE: tuple[Rung, ...] = (_microbatch, _sequence, *_WEIGHTS)
_ENGINE: tuple[Rung, ...] = (_relief, _paged, _lengths, _offload, _tensor_parallel)
_LADDERS: dict[str, tuple[Rung, ...]] = {
    "load": (_meta_init, _cpu_offload, _replicas, _lora),
    "start_engine": _ENGINE,
    "generate": _ENGINE,
    "sync": (_relief, _bucket, _offload, _tensor_parallel),
    "receive": (_relief, _bucket, _tensor_parallel),
    "send": (_bucket, *_WEIGHTS),
    "embed": (_images, _offload),
    "reference_logprobs": _SCORE,
    "logprobs": _SCORE,
    "values": _SCORE,
    "update": (_checkpointing, _microbatch, _sequence, _gradients, *_WEIGHTS),
    "update_critic": (_microbatch, _sequence, _gradients, *_WEIGHTS),  # the critic's layers are never checkpointed
    "save": (_offload, _lora),
    "restore": (_offload,),
}
"""By stage, each followed by more devices."""
_HOST: tuple[Rung, ...] = (_meta_init, _keep, _cpu_offload_off, _reward_workers)
