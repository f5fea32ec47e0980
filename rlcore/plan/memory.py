"""The memory plan of a run: bytes of every part in every phase, on a device of each pool and in its process's host memory.

Pure arithmetic on the run file, the shapes of the model's weights and the bytes of its passes (`shapes`). P are the
parameters, t of them trained, b bytes of the compute dtype, S devices that share a copy, all per device:

    parameters        4 t / S + b (P - t) / S                exact; each tensor's first dimension is cut into S equal parts
    working copy      b t, on one device in bf16             exact; FSDP2 makes it layer by layer instead
    moments           8 t / S                                exact
    gradients         4 t / S; 4 t while micro-batches are summed before they are reduced
    reference         b P / S                                exact; none with LoRA, whose reference is the actor
    vision encoder    b of its weights, whole                exact
    engine            b P / T weights over T devices         exact; cache as the engine's settings say
    gathered layers   b (root + 3 layers)                    estimate: one that runs, one that comes, and its buffer
    gradients of a layer                  (4 + b) layer      estimate: being reduced
    activations, logits tile                                 counted on the model's own code, without an allocator's waste
    kept by malloc    what an update frees, if malloc is the C library's: blocks below 32 MiB stay in the process

A gradient, moment or master weight has 4 bytes. What is in a phase follows from `rlcore.runtime.memory`, which moves the parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlcore.config.placement import PoolShape
from rlcore.config.schema import RunConfig
from rlcore.device import EngineMemory
from rlcore.monitor.clock import Clock
from rlcore.runtime.memory import MemoryManager

Command = Literal["grpo", "sft", "dpo"]
_SAMPLED = 256  # sequences that are decoded at a time, by the plain sampler and by vLLM unless told otherwise
_LARGE = 2**23  # numbers of a gradient of 32 MiB
_RUNTIME = 2**30  # of a device with memory of its own: driver's context, libraries' workspaces, buffers of collectives
_CYCLE = ("reshard", "send", "encode", "infer", "reference", "score", "train", "save")


@dataclass(frozen=True)
class Weight:
    """A parameter of the model."""

    rows: int  # its first dimension, which is sharded
    numbers: int
    trained: bool
    where: str  # "tower", "root", or the number of a layer
    stateless: bool = False  # no loss depends on it, so that it has no gradient
    lora: bool = False

    def part(self, shards: int) -> int:
        """Numbers on the device with most."""
        return -(-self.rows // shards) * (self.numbers // max(self.rows, 1)) if shards > 1 else self.numbers


@dataclass(frozen=True)
class Row:
    """The longest packed row of a rank."""

    tokens: int
    targets: int
    prompts: int  # whose images it has
    count: int  # rows of an optimizer step


@dataclass(frozen=True)
class Passes:
    """Peak bytes of forward and backward passes, weights left out; on one device those that train include gradients."""

    update: int = 0
    update_otherwise: int = 0  # with train.gradient_checkpointing the other way round
    score: int = 0  # without gradients
    critic: int = 0
    tower: int = 0  # the tower on vision.images_per_batch images
    tower_update: int = 0  # a tower that learns, on the images of the row
    image_embeds: int = 0  # bytes of the embeddings of one prompt's images


@dataclass(frozen=True)
class Geometry:
    """What the arithmetic needs to know of the models."""

    policy: Sequence[Weight]
    critic: Sequence[Weight]
    reference: int  # parameters of the model without LoRA, the tower's too
    tower: int
    layers: int
    cache_width: int  # numbers of keys and values of a token, in all layers
    vocabulary: int
    largest: int  # numbers of the largest tensor
    row: Row
    passes: Passes


@dataclass(frozen=True)
class Facts:
    """The device and what runs on it."""

    own_memory: bool
    engine: EngineMemory | None  # None: the cache grows with what is sampled
    device: int | None  # bytes of a device's memory
    dtype: int  # bytes of a number of the compute dtype
    tile: int  # bytes of a tile of logits
    process: int  # bytes of host memory of a process before it loads a model
    keeps: bool = False  # whether malloc keeps the memory that an update frees, as the C library's does


@dataclass(frozen=True)
class Item:
    """A part in a phase."""

    what: str
    bytes: int
    keys: str  # settings that decide it
    exact: bool = True


@dataclass(frozen=True)
class PhasePlan:
    name: str
    device: tuple[Item, ...]  # also the host's, where devices have no memory of their own
    host: tuple[Item, ...] = ()

    @property
    def total(self) -> int:
        return sum(item.bytes for item in self.device)

    @property
    def host_total(self) -> int:
        return sum(item.bytes for item in self.host)


@dataclass(frozen=True)
class PoolPlan:
    """Memory of each device of a pool."""

    shape: PoolShape
    phases: tuple[PhasePlan, ...]
    update_otherwise: int  # activations under the other setting of gradient checkpointing; 0 without training

    @property
    def peak(self) -> PhasePlan:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def host_peak(self) -> PhasePlan:
        return max(self.phases, key=lambda phase: phase.host_total)


def memory_plan(config: RunConfig, command: Command, geometry: Geometry, facts: Facts) -> list[PoolPlan]:
    """One plan per pool of the run."""
    return [_Pool(config, command, geometry, facts, shape).plan() for shape in config.topology.pools]


class _Part:
    """A part that can be offloaded: `rlcore.runtime.memory.Offloadable` without tensors."""

    def __init__(self, *items: Item) -> None:
        self.items, self.away = items, False

    def pause(self) -> None:
        self.away = True

    def resume(self) -> None:
        self.away = False

    def device_bytes(self) -> int:
        return sum(item.bytes for item in self.held())

    def held(self) -> tuple[Item, ...]:
        return () if self.away else self.items

    def kept(self) -> tuple[Item, ...]:
        """Copies in host memory."""
        return self.items if self.away else ()


class _Engine(_Part):
    """Weights and cache: a pause frees the cache and, as the engine can, moves or drops the weights; the cache returns when
    there is something to sample."""

    def __init__(self, weights: Item, cache: Item | None, sleeps: int) -> None:
        super().__init__(weights)
        self.cache, self.sleeps, self.cached = cache, sleeps, True

    def pause(self) -> None:
        super().pause()
        self.cached = False

    def sample(self) -> None:
        self.cached = True

    def held(self) -> tuple[Item, ...]:
        weights = () if self.away and self.sleeps else self.items
        return (*weights, self.cache) if self.cache and self.cached else weights

    def kept(self) -> tuple[Item, ...]:
        return self.items if self.away and self.sleeps == 1 else ()


class _Pool:
    """The plan of one pool."""

    def __init__(self, config: RunConfig, command: Command, geometry: Geometry, facts: Facts, shape: PoolShape) -> None:
        self.config, self.command, self.geometry, self.facts, self.shape = config, command, geometry, facts, shape
        replicas = config.sharding.replicas
        self.shards = 1 if replicas == "all" else shape.devices // replicas
        self.sharded = shape.devices > 1
        self.trains = "actor" in shape.roles
        self.samples = "rollout" in shape.roles and command == "grpo"
        self.once = config.model.images_are_read_once
        compared = config.algorithm.kl_coef > 0 if command == "grpo" else command == "dpo"
        self.compares = compared and "reference" in shape.roles
        self.switched = self.compares and self.trains and config.model.lora is not None  # the reference is the actor, LoRA off
        self.embeds = self.once and "vision" in shape.roles
        self.below = self.sharded and config.sharding.cpu_offload and facts.own_memory  # weights rest in host memory

    def plan(self) -> PoolPlan:
        found: dict[str, PhasePlan] = {}
        for phase in (self._load(), *self._cycle()):
            both = (found.get(phase.name, phase), phase)
            device, host = max(both, key=lambda one: one.total), max(both, key=lambda one: one.host_total)
            found[phase.name] = replace(device, host=host.host)
        otherwise = max(0, self.geometry.passes.update_otherwise - self._counted_gradients()) if self.trains else 0
        return PoolPlan(self.shape, tuple(found.values()), otherwise)

    # phases

    def _load(self) -> PhasePlan:
        """LoRA, one device, and meta_init false load whole models in float32."""
        geometry, config = self.geometry, self.config
        parts = [item for name, part in self._parts().items() if name not in ("engine", "optimizer") for item in part.held()]
        if not (self.trains or self.compares):
            return self._phase("load", parts, ())
        whole = not self.sharded or not config.sharding.meta_init or config.model.lora is not None
        host: list[Item] = []
        if whole:
            copies = 1 + (self.trains and self.compares and not self.switched)
            key = "sharding.meta_init" if self.sharded else "model.path"
            size = 4 * geometry.reference * copies - 4 * geometry.tower * (copies - 1) * self.once
            critic = 4 * sum(weight.numbers for weight in geometry.critic) if self.trains else 0
            parts = [Item("weights while loading", size + critic, key)]
            host = [Item("weights while loading", 4 * geometry.reference, key)] * self.facts.own_memory
        return self._phase("load", parts, host)

    def _cycle(self) -> Iterator[PhasePlan]:
        """Start the engine, then go through two steps: in the second there are moments."""
        manager = MemoryManager(Clock(), self.config.placement.offload)
        parts = self._parts()
        moments = parts.pop("optimizer", None)
        for name, part in parts.items():
            manager.register(name, part)
        if "engine" in parts:
            yield self._held("start", parts)
        saves = self.config.train.save_every and self.config.train.steps > self.config.train.save_every
        for turn in range(2):
            for name in filter(self._has, _CYCLE):
                with manager.phase(name):
                    engine = parts.get("engine")
                    if name == "infer" and isinstance(engine, _Engine):
                        engine.sample()
                    if name == "train" and moments and "optimizer" not in parts:
                        parts["optimizer"] = moments
                        manager.register("optimizer", moments)
                yield self._held(name, parts, writing=bool(turn and saves))

    def _has(self, phase: str) -> bool:
        apart = not (self.trains and self.samples)
        return {
            "reshard": self.samples, "send": self.trains and apart and self.command == "grpo", "encode": self.embeds,
            "infer": self.samples, "reference": self.compares and not self.switched, "score": self.trains and self._scores(),
            "train": self.trains, "save": self.trains,
        }[phase]  # fmt: skip

    def _scores(self) -> bool:
        train, algorithm = self.config.train, self.config.algorithm
        again = train.minibatches_per_step * train.epochs_per_step > 1
        return self.command == "grpo" and (
            again or self.switched or self.config.critic is not None or (algorithm.kl_coef > 0 and algorithm.kl_in == "reward")
        )

    def _held(self, name: str, parts: Mapping[str, _Part], writing: bool = False) -> PhasePlan:
        device = [item for part in parts.values() for item in part.held()]
        moved = [replace(item, what=f"offloaded {item.what}") for part in parts.values() for item in part.kept()]
        if self.below:
            mine = ("parameters", "moments", "reference")
            moved += [item for item in device if item.what in mine]
            device = [item for item in device if item.what not in mine]
        extra, host = self._passing(name)
        if writing and name != "save":
            host += self._snapshot()
        if self.facts.keeps and name != "train" and "optimizer" in parts:
            host.append(Item("kept by malloc", self._kept_by_malloc(), "jemalloc (docs/launching.md)", exact=False))
        if not self.facts.own_memory and self.sharded and name not in ("start", "reshard", "send"):
            host += self._exchanged()
        return self._phase(name, [*device, *extra], [*moved, *host])

    def _phase(self, name: str, device: Sequence[Item], host: Sequence[Item]) -> PhasePlan:
        facts = self.facts
        engine = facts.engine.process if facts.engine and self.samples and name != "load" else 0
        process = Item("process", facts.process + engine, "rollout.engine", exact=False)
        if not facts.own_memory:
            return PhasePlan(name, _there([process, *device, *host]))
        runtime = Item("device runtime", _RUNTIME, "backend.name", exact=False)
        return PhasePlan(name, _there([runtime, *device]), _there([process, *host]))

    # parts that stay

    def _parts(self) -> dict[str, _Part]:
        """As the worker registers them."""
        found: dict[str, _Part] = {}
        if self.trains:
            critic = self.geometry.critic
            mine = [*self._of_policy(), *critic]
            items = [Item("parameters", sum(map(self._resting, mine)), self._sharding_key)]
            copied = sum(self.facts.dtype * weight.numbers for weight in mine if weight.trained)
            if not self.sharded and self.facts.dtype < 4:
                items.append(Item("working copy", copied, "model.precision"))
            found["parameters"] = _Part(*items)
            moments = sum(8 * weight.part(self.shards) for weight in mine if weight.trained and not weight.stateless)
            found["optimizer"] = _Part(Item("moments", moments, f"{self._sharding_key}, model.lora"))
        if self.compares and not self.switched:
            left_out = "tower" if self.once and (self.trains or self.embeds) else ""
            numbers = sum(
                weight.numbers if self.once and weight.where == "tower" else weight.part(self.shards)
                for weight in self.geometry.policy if not weight.lora and weight.where != left_out
            )  # fmt: skip
            found["reference"] = _Part(Item("reference", self.facts.dtype * numbers, "algorithm.kl_coef, model.lora"))
        if self.once and (self.trains or self.embeds):
            found["vision"] = _Part(Item("vision encoder", self.facts.dtype * self.geometry.tower, "model.freeze"))
        if self.samples:
            found["engine"] = self._engine()
        return found

    def _of_policy(self) -> list[Weight]:
        return [weight for weight in self.geometry.policy if not (self.once and weight.where == "tower")]

    def _resting(self, weight: Weight) -> int:
        return weight.part(self.shards) * (4 if weight.trained else self.facts.dtype)

    @property
    def _sharding_key(self) -> str:
        return f"{self.shape.setting}, sharding.replicas"

    def _engine(self) -> _Engine:
        memory, devices = self.facts.engine, self.config.rollout.tensor_parallel
        weights = Item("engine weights", self.facts.dtype * self.geometry.reference // devices, "rollout.tensor_parallel")
        if memory is None:
            return _Engine(weights, None, sleeps=1)
        size = memory.cache
        if size is None:
            size = max(0, int(memory.now * (self.facts.device or 0)) - weights.bytes)
        return _Engine(weights, Item("engine cache", size, memory.key), memory.sleeps)

    # parts that come and go

    def _passing(self, phase: str) -> tuple[list[Item], list[Item]]:
        """Items on the device and in host memory that a phase has for itself."""
        geometry, passes = self.geometry, self.geometry.passes
        size = passes.image_embeds * geometry.row.prompts * self.once
        embeds = Item("image embeddings", size, "vision.max_pixels", exact=False)
        if phase in ("reshard", "send"):
            return self._exchanged(), []
        if phase == "infer":
            return self._sampling(), self._embedded()
        if phase == "encode":
            return [Item("activations", passes.tower, "vision.images_per_batch", exact=False)], self._embedded()
        if phase in ("reference", "score"):
            return [*self._forward(passes.score), embeds, *self._gathered()], self._embedded()
        if phase == "train":
            return [*self._update(), embeds, *self._gathered(backward=True)], self._embedded()
        if phase == "save":
            return [], self._snapshot()
        return [], []

    def _forward(self, size: int) -> list[Item]:
        tile = min(self._tile(), size)
        key = "train.max_tokens_per_microbatch"
        return [
            Item("activations", size - tile, key, exact=False), Item("logits tile", tile, "backend.name", exact=False)
        ]  # fmt: skip

    def _update(self) -> list[Item]:
        passes = self.geometry.passes
        gradients = self._gradients()
        more = max(0, max(passes.update, passes.critic) - self._counted_gradients())
        activations, tile = self._forward(more)
        keys = f"train.gradient_checkpointing, {activations.keys}, sharding.sequence_parallel"
        found = [Item("gradients", gradients, "sharding.gradient_sync, model.lora", exact=self.sharded)]
        found += [replace(activations, keys=keys), tile]
        if not self.once and passes.tower_update:
            found.append(Item("vision activations", passes.tower_update, "vision.max_pixels, model.freeze", exact=False))
        if self.below:
            found[0] = replace(found[0], bytes=0)
        return found

    def _counted_gradients(self) -> int:
        """Gradients that the count of the update's passes includes."""
        return 0 if self.sharded else self._gradients()

    def _gradients(self) -> int:
        learning = max((self._of_policy(), self.geometry.critic), key=lambda weights: sum(one.numbers for one in weights))
        mine = [weight for weight in learning if weight.trained and not weight.stateless]
        summed = self.sharded and self.config.sharding.gradient_sync == "last" and self.geometry.row.count > 1
        return sum(4 * (weight.numbers if summed else weight.part(self.shards)) for weight in mine)

    def _tile(self) -> int:
        """Logits of a tile and their exponentials, float32."""
        return 2 * min(self.facts.tile, 4 * self.geometry.vocabulary * self.geometry.row.targets)

    def _gathered(self, backward: bool = False) -> list[Item]:
        if not self.sharded:
            return []
        layers: dict[str, int] = {}
        for weight in self._of_policy():
            layers[weight.where] = layers.get(weight.where, 0) + weight.numbers
        root, size = layers.pop("root", 0) + layers.pop("tower", 0), self.facts.dtype
        most = max(layers.values(), default=0)
        kept = backward and not self.config.sharding.reshard_after_forward
        here = sum(layers.values()) + most if kept else 3 * most
        found = [Item("gathered layers", size * (root + here), "sharding.reshard_after_forward", exact=False)]
        if backward:
            found.append(Item("gradients of a layer", (4 + size) * most, "model.path", exact=False))
        return found

    def _kept_by_malloc(self) -> int:
        """What an update frees in blocks that the C library's malloc does not return, those below 32 MiB."""
        passing, _ = self._passing("train")
        whole = [] if self.sharded else [weight.numbers for weight in self._of_policy() if weight.trained]
        returned = 4 * sum(numbers for numbers in whole if numbers >= _LARGE)
        return sum(item.bytes for item in passing) - min(returned, self._gradients())

    def _exchanged(self) -> list[Item]:
        """Buckets of a weight sync. On a CPU they are memory that ranks share and keep."""
        if not self.samples and self.command != "grpo":
            return []
        return [Item("weights on their way to engines", self._on_the_way(), "sharding.bucket_mib", exact=False)]

    def _on_the_way(self) -> int:
        """Two buckets of half of `sharding.bucket_mib`; one tensor, where nothing is gathered."""
        largest = self.facts.dtype * self.geometry.largest
        if not self.sharded and not self.config.placement.apart:
            return largest if self.facts.dtype < 4 else 0
        published = self.facts.dtype * self.geometry.reference
        return max(largest, min(self.config.sharding.bucket_mib * 2**20, 2 * published))

    def _sampling(self) -> list[Item]:
        config, geometry = self.config, self.geometry
        engines = self.shape.devices // config.rollout.tensor_parallel
        group = config.algorithm.group_size
        most = -(-config.train.prompts_per_step // engines) * group
        evaluated = [(_SAMPLED, one.max_new_tokens) for one in config.evaluation_sets.values()]
        together = min(most, max(1, _SAMPLED // group) * group)
        calls = [(together, config.rollout.max_new_tokens), *evaluated]
        logits = Item("sampled logits", 16 * min(most, _SAMPLED) * geometry.vocabulary, "algorithm.group_size", exact=False)
        if self.facts.engine is not None:
            return [logits] if self.facts.engine.cache is not None else []
        tokens = max(samples * (config.data.max_prompt_tokens + response) for samples, response in calls)
        width = geometry.cache_width + geometry.cache_width // geometry.layers  # a layer's cache is copied as it grows
        key = "rollout.max_new_tokens, algorithm.group_size"
        return [Item("engine cache", self.facts.dtype * tokens * width, key, exact=False), logits]

    def _embedded(self) -> list[Item]:
        """Embeddings of a step's images: in the process that trains, or once on each node (Ray's object store)."""
        if not self.once or not self.geometry.passes.image_embeds:
            return []
        size = self.geometry.passes.image_embeds * self.config.train.prompts_per_step
        return [Item("embeddings of a step", size, "train.prompts_per_step, vision.max_pixels", exact=False)]

    def _snapshot(self) -> list[Item]:
        """This rank's rows of a checkpoint: the weights in float32, and the moments."""
        moments = sum(item.bytes for item in self._parts()["optimizer"].items)
        size = 4 * self.geometry.reference // self.shards + moments
        return [Item("checkpoint copy", size, "train.save_every")]


def _there(items: Sequence[Item]) -> tuple[Item, ...]:
    """Items that have bytes, those of one name added up."""
    found: dict[str, Item] = {}
    for item in items:
        there = found.get(item.what)
        found[item.what] = replace(item, bytes=item.bytes + there.bytes) if there else item
    return tuple(item for item in found.values() if item.bytes)
