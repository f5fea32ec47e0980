"""The sections that say how many devices a run has, and what each of them does."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from rlcore.config.sections import Strict


class ShardingConfig(Strict):
    """How the devices of a pool share a model that is trained or compared with."""

    replicas: PositiveInt = 1
    """Copies of the model; the devices of each copy hold a part of it."""
    sequence_parallel: PositiveInt = 1
    """Devices that work on one packed row together (arXiv 2309.14509)."""
    cpu_offload: bool = False
    """Weights, gradients and optimizer rest in host memory."""
    gradient_sync: Literal["last", "each"] = "last"
    """Sum gradients once an optimizer step, which keeps them whole on each device until then, or after each micro-batch."""
    meta_init: bool = True
    """Each device reads its own part of the weight files, so that a machine never holds a copy of the model a device."""
    bucket_mib: PositiveInt = 512
    """Of weights that are gathered at once on their way to an engine."""


COMPANIONS = {"reference": "actor", "vision": "rollout"}
"""Where a role is that no pool lists."""


class PoolConfig(Strict):
    """Identical workers, one a device."""

    roles: list[Literal["actor", "reference", "rollout", "vision"]]
    """The critic goes with the actor; where no pool lists them, the reference does too, and the vision encoder goes with the
    rollout."""
    devices: PositiveInt = 1


class PlacementConfig(Strict):
    kind: str = "local"
    """local is this process; ray, worker processes on one node or many; or any installed placement."""
    devices: PositiveInt = 1
    """Of one pool that hosts every role."""
    pools: dict[str, PoolConfig] = {}
    """Several pools by name, each role in one of them, instead of devices."""
    reward_workers: NonNegativeInt = 0
    """Processes without a device that score samples while engines go on; 0 scores in the controller."""
    max_staleness: Literal[0, 1] = 0
    """1 samples the next step while this one updates, with the weights of before."""
    offload: list[Literal["parameters", "optimizer", "reference", "engine", "vision"]] = []
    """What leaves the device, to host memory, while others need the room: the actor's weights, its moments, the reference, the
    engine's cache, the vision encoder."""
    max_restarts: NonNegativeInt = 0
    """Times that a run whose worker died goes on from its last checkpoint by itself."""
    stall_seconds: NonNegativeFloat = 1800.0
    """The run ends, with a report, when nothing has moved for this long: no stage, packed row or engine step; 0 is never."""
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
        """Whether samples are drawn on other devices than those that train."""
        return not any({"actor", "rollout"} <= set(pool.roles) for pool in self.pools.values()) and bool(self.pools)
