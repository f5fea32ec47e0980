"""Sections for the devices of a run: placement of the roles, and sharding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from rlcore.config.sections import Strict


class ShardingConfig(Strict):
    """Sharding of the actor, critic and reference over the devices of a pool."""

    replicas: PositiveInt | Literal["all"] = 1
    """Copies of the model, each sharded over its own devices (hybrid_shard); all is one on every device (no_shard)."""
    reshard_after_forward: bool = True
    """Free a layer's gathered weights between the forward and the backward pass; false keeps them (shard_grad_op)."""
    sequence_parallel: PositiveInt = 1
    """Devices that process one packed row together (arXiv 2309.14509)."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in host memory."""
    gradient_sync: Literal["last", "each"] = "last"
    """Reduce-scatter gradients once per optimizer step (keeps full gradients meanwhile) or after every micro-batch."""
    meta_init: bool = True
    """Each device reads only its shard of the weight files, so that a machine never holds one model copy per device."""
    bucket_mib: PositiveInt = 512
    """MiB of weights that are gathered at once in a weight sync."""


COMPANIONS = {"reference": "actor", "vision": "rollout"}
ROLES = ("actor", "reference", "rollout", "vision")
"""Role whose pool a role joins that no pool lists."""


class PoolConfig(Strict):
    """Identical workers, one per device."""

    roles: list[Literal["actor", "reference", "rollout", "vision"]]
    """The critic is always with the actor; if no pool lists them, the reference is with the actor and the vision encoder with
    the rollout."""
    devices: PositiveInt = 1


class PlacementConfig(Strict):
    kind: str = "local"
    """local: this process; ray: worker processes on one or more nodes; or any installed placement."""
    devices: PositiveInt = 1
    """Devices of a single pool that hosts every role."""
    pools: dict[str, PoolConfig] = {}
    """Several pools by name, each role in one of them, instead of devices."""
    reward_workers: NonNegativeInt = 0
    """Processes without a device that score samples while engines go on; 0 scores in the controller."""
    max_staleness: Literal[0, 1] = 0
    """Policy versions a sample may lag: 0 is synchronous, 1 overlaps sampling the next step with the update."""
    offload: list[Literal["parameters", "optimizer", "reference", "engine", "vision"]] = []
    """Parts offloaded to host memory in phases that do not need them: the actor's weights, its moments, the reference, the
    engine's cache, the vision encoder."""
    max_restarts: NonNegativeInt = 0
    """Automatic restarts from the last checkpoint after a worker died."""
    stall_seconds: NonNegativeFloat = 1800.0
    """Seconds without progress (no stage, packed row or engine step) after which the run ends with a report; 0 is never."""
    options: dict[str, Any] = {}
    """Arguments of the placement."""

    @model_validator(mode="after")
    def _each_role_has_one_place(self) -> PlacementConfig:
        owners: dict[str, str] = {}
        for name, pool in self.pools.items():
            for role in pool.roles:
                if role in owners:
                    raise ValueError(f"pools.{name}.roles: {role} is already in the pool {owners[role]!r}; list each role once")
                owners[role] = name
        if self.pools and (missing := [role for role in ("actor", "rollout") if role not in owners]):
            raise ValueError(f"pools: no pool has the role {missing[0]}; add it to one")
        if self.pools and self.devices != 1:
            raise ValueError("devices: each pool says its own; remove one of placement.devices and placement.pools")
        if self.kind == "local" and (self.pools or self.devices > 1):
            raise ValueError("kind: local is one process on one device; set placement.kind=ray for more, or for several pools")
        if self.kind == "local" and self.reward_workers:
            raise ValueError(f"reward_workers: {self.reward_workers} need placement.kind=ray; set it, or remove them")
        if self.max_staleness and not self.apart:
            raise ValueError("max_staleness: 1 needs actor and rollout in different pools, so that both can work at a time")
        return self

    @property
    def apart(self) -> bool:
        """Whether sampling and training are on different devices."""
        return not any({"actor", "rollout"} <= set(pool.roles) for pool in self.pools.values()) and bool(self.pools)


class PoolShape(NamedTuple):
    """Size and roles of one pool."""

    setting: str  # run-file key of its size
    devices: int
    roles: frozenset[str]


@dataclass(frozen=True)
class Topology:
    """All pools of a run. Each role is in one of them."""

    pools: tuple[PoolShape, ...]

    @property
    def devices(self) -> int:
        return sum(pool.devices for pool in self.pools)

    def of(self, role: str) -> PoolShape:
        """The pool that has this role."""
        return next(pool for pool in self.pools if role in pool.roles)
