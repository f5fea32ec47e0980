"""Pools of worker processes on Ray: one actor a device, on one node or on many."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Concatenate

import ray
from pydantic import PositiveFloat
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlcore import registry
from rlcore.config.loader import validate
from rlcore.config.schema import RunConfig
from rlcore.config.sections import Strict
from rlcore.device import Backend
from rlcore.errors import ConfigError, RlcoreError
from rlcore.model.resolved import ResolvedModel
from rlcore.monitor.heartbeat import Place, publish
from rlcore.runtime import jemalloc
from rlcore.runtime.placement import Placement
from rlcore.runtime.pool import P, Pool, R, results
from rlcore.runtime.reward_worker import RewardWorker
from rlcore.runtime.watchdog import Watchdog
from rlcore.runtime.worker import Worker

from ..common import node_address
from . import debugging
from .observers import Observers, died
from .store import Outbox, Parcel, RayStore, unpacked, values


class RayOptions(Strict):
    """`placement.options` of kind ray."""

    address: str | None = None
    """Of a running cluster; unset joins that of RAY_ADDRESS, or starts one on this machine that ends with the run."""
    wait_seconds: PositiveFloat = 300.0
    """For the devices to be there and free."""


def open_pools(resolved: ResolvedModel, watchdog: Watchdog) -> Placement:
    """Every pool of the run file with its workers. ConfigError when the cluster has not the devices."""
    model = resolved.config.model.model_copy(update={"precision": resolved.precision})
    config = resolved.config.model_copy(update={"model": model})  # processors of other nodes might choose another
    options = validate(RayOptions, config.placement.options, "placement.options.")
    total = sum(devices for _, devices, _ in config.pools())
    started = _connect(options, resolved.backend, total)
    backend = resolved.backend.sharing(-(-total // sum(node["Alive"] for node in ray.nodes())))
    backend.given = resolved.backend.given
    opened: list[_Devices | _Scorers] = []
    observers, store = Observers(), RayStore()
    watchdog.workers = observers.look

    def close() -> None:
        observers.close()
        for devices in opened:
            devices.release()
        if started:
            ray.shutdown()

    try:
        pools: dict[str, Pool] = {}
        for setting, devices, roles in config.pools():
            opened.append(_Devices(config, backend, setting, devices, roles, options.wait_seconds, observers, store))
            trains = not roles.isdisjoint({"actor", "reference"})
            pool = Pool(opened[-1].members, config.sharding.sequence_parallel if trains else 1, store)
            pools |= dict.fromkeys(roles, pool)
        _connect_broadcast(pools["actor"], pools["rollout"])
        if config.placement.reward_workers:
            opened.append(_Scorers(config, observers, store))
            pools["reward"] = Pool(opened[-1].members, store=store)
        return Placement(config, pools, close, store)
    except BaseException:
        close()
        raise


class Process:
    """A worker in a process of its own."""

    def __init__(self) -> None:
        self.outbox = Outbox()

    def show(self, who: str) -> tuple[str, Place]:
        """Ray's id of this node, and where others on it see what this process does."""
        self.heartbeat, place = publish(who, ray.util.get_node_ip_address())
        return ray.get_runtime_context().get_node_id(), place

    def open(self, config: RunConfig, options: Any, roles: Sequence[str]) -> None:
        with self.heartbeat.stage("open"):
            resolved = ResolvedModel(config, registry.load("backends", config.backend.name)(options))
            self.worker = Worker(resolved, roles, self.heartbeat, self.outbox.put)
        from transformers.utils import logging  # after the backend has made it importable

        logging.disable_progress_bar()

    def open_rewards(self, config: RunConfig, path: Sequence[str]) -> None:
        """`path`: where the controller finds modules, which a reward may be in."""
        sys.path += [folder for folder in path if folder not in sys.path]
        self.worker = RewardWorker(config.reward)

    def rendezvous_address(self) -> str:
        """A free port of this node; an IPv6 address in brackets."""
        return node_address.free_endpoint(ray.util.get_node_ip_address())

    def join(self, rank: int, size: int, address: str) -> None:
        for name, value in self.worker.resolved.backend.network(ray.util.get_node_ip_address()).items():
            os.environ.setdefault(name, value)
        with self.heartbeat.stage("join"):
            self.worker.join(rank, size, address)

    def call(self, method: str, arguments: Parcel) -> Parcel:
        args, kwargs = unpacked(arguments, values)
        with self.heartbeat.stage(method):
            return self.outbox.answer(getattr(self.worker, method)(*args, **kwargs))

    def stream(self, method: str, arguments: Parcel) -> Iterator[Parcel]:
        args, kwargs = unpacked(arguments, values)
        with self.heartbeat.stage(method):
            for item in getattr(self.worker, method)(*args, **kwargs):
                yield self.outbox.answer(item)


class Remote:
    """A member of a pool, seen from the controller."""

    def __init__(self, process: Any, name: str, store: RayStore) -> None:
        self.process, self.name, self.store = process, name, store
        self.where = "not started"

    def call(self, method: Callable[Concatenate[Any, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        name = method.__name__
        return self._answer(name, self.process.call.remote(name, self.store.sent((args, kwargs))), self.store.received)

    def stream(self, method: Callable[Concatenate[Any, P], Iterator[R]], *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        name = method.__name__
        answers = self.process.stream.options(num_returns="streaming").remote(name, self.store.sent((args, kwargs)))
        return self._received(name, answers)

    def _received(self, method: str, answers: Any) -> Iterator[Any]:
        try:
            for answer in answers:
                yield self.store.received(ray.get(answer))
        except RayError as error:
            raise self._explained(error, method) from error

    def ask(self, method: Callable[Concatenate[Any, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """A call of the process itself, not of its worker."""
        name = method.__name__
        return self._answer(name, getattr(self.process, name).remote(*args, **kwargs), lambda given: given)

    def _answer(self, method: str, asked: Any, read: Callable[[Any], Any]) -> Future[Any]:
        """What `read` makes of the process's answer."""
        answer: Future[Any] = Future()
        asked.future().add_done_callback(partial(self._resolve, answer, method, read))
        return answer

    def _resolve(self, answer: Future[Any], method: str, read: Callable[[Any], Any], done: Future[Any]) -> None:
        try:
            answer.set_result(read(done.result()))
        except Exception as error:
            answer.set_exception(self._explained(error, method))

    def _explained(self, error: BaseException, method: str) -> BaseException:
        cause = getattr(error, "cause", None)
        if isinstance(cause, RlcoreError):
            return cause
        return died(self.name, self.where, method, error) if isinstance(error, RayActorError) else error


def _show(members: Sequence[Remote], observers: Observers) -> None:
    """From now on they are watched, and messages say where they are."""
    shown = results([member.ask(Process.show, member.name) for member in members])
    for member, (node, place) in zip(members, shown, strict=True):
        member.where = str(place)
        observers.add(node, place)


def _connect_broadcast(actor: Pool, rollout: Pool) -> None:
    """What weights travel through, where engines are in another pool."""
    if actor is not rollout:
        ends = [actor.members[0], *rollout.members]
        address = ends[0].ask(Process.rendezvous_address).result()
        results([end.call(Worker.connect_broadcast, rank, len(ends), address) for rank, end in enumerate(ends)])


class _Devices:
    """The workers of one pool, and what Ray has reserved for them."""

    def __init__(
        self, config: RunConfig, backend: Backend, setting: str, devices: int, roles: set[str], wait_seconds: float,
        observers: Observers, store: RayStore,
    ) -> None:
        self._processes: list[Any] = []
        self._group = _reserved(dict(backend.device_resources()), setting, devices, wait_seconds)
        try:
            nodes = placement_group_table(self._group)["bundles_to_node_id"]
            neighbours = sorted(range(devices), key=lambda bundle: (nodes[bundle], bundle))
            self._processes = [self._process(backend, bundle) for bundle in neighbours]
            self.members = self._started(config, backend, setting, roles, observers, store)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """The processes end, and their devices are free."""
        for process in self._processes:
            ray.kill(process)
        remove_placement_group(self._group)

    def _process(self, backend: Backend, bundle: int) -> Any:
        return ray.remote(Process).options(
            num_cpus=backend.device_resources().get("CPU", 0),
            resources={name: amount for name, amount in backend.device_resources().items() if name not in ("CPU", "GPU")},
            num_gpus=backend.device_resources().get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
            runtime_env={"env_vars": {**backend.environment(), **backend.given, **_inherited()}},
        ).remote()

    def _started(
        self, config: RunConfig, backend: Backend, setting: str, roles: set[str], observers: Observers, store: RayStore
    ) -> list[Remote]:
        chosen = config.backend.model_copy(update={"name": backend.name})
        config = config.model_copy(update={"backend": chosen})
        size, kind = len(self._processes), " ".join(["worker", *setting.split(".")[2:-1]])
        members = [Remote(process, f"{kind} {rank} of {size}", store) for rank, process in enumerate(self._processes)]
        _show(members, observers)
        results([member.ask(Process.open, config, backend.options, sorted(roles)) for member in members])
        if size > 1:
            address = members[0].ask(Process.rendezvous_address).result()
            results([member.ask(Process.join, rank, size, address) for rank, member in enumerate(members)])
        return members


class _Scorers:
    """Workers that score: on any node, in what its devices leave of its processors."""

    def __init__(self, config: RunConfig, observers: Observers, store: RayStore) -> None:
        count = config.placement.reward_workers
        environment = {"env_vars": _inherited()}
        self._processes = [
            ray.remote(Process).options(num_cpus=0, scheduling_strategy="SPREAD", runtime_env=environment).remote()
            for _ in range(count)
        ]
        self.members = [
            Remote(process, f"reward worker {n} of {count}", store) for n, process in enumerate(self._processes)
        ]
        try:
            _show(self.members, observers)
            results([member.ask(Process.open_rewards, config, sys.path) for member in self.members])
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        for process in self._processes:
            ray.kill(process)


def _inherited() -> dict[str, str]:
    """Variables that travel from this process to every worker: a cluster that exists has an environment of its own."""
    return {**debugging.environment(os.environ), **jemalloc.inherited(os.environ)}


def _connect(options: RayOptions, backend: Backend, devices: int) -> bool:
    """Whether this process started a Ray of its own."""
    address = options.address or os.environ.get("RAY_ADDRESS")
    started = not ray.is_initialized() and not address
    quiet = {"include_dashboard": False, "logging_level": "ERROR", "configure_logging": False}
    leave = signal.getsignal(signal.SIGTERM)
    try:
        if started:
            logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # that it asks for its token is no news
            cpus = backend.sharing(devices).device_resources().get("CPU", 1) * devices
            ray.init("local", num_cpus=max(os.cpu_count() or 1, int(cpus)), **quiet)
        elif not ray.is_initialized():
            ray.init(address, logging_level="ERROR", configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"placement.options.address: Ray at {address or 'this machine'} cannot be joined: {error}") from error
    signal.signal(signal.SIGTERM, leave)  # Ray's own would end the run without saving
    return started


def _reserved(bundle: dict[str, float], setting: str, devices: int, wait_seconds: float) -> PlacementGroup:
    there, free = ray.cluster_resources(), ray.available_resources()
    counts = ", ".join(f"{there.get(name, 0):g} {name} of which {free.get(name, 0):g} free" for name in bundle)
    wanted = f"{setting}: {devices} devices of " + " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    if any(there.get(name, 0) < amount * devices for name, amount in bundle.items()):
        raise ConfigError(f"{wanted} are more than the cluster has ({counts}); lower it or add nodes")
    group = placement_group([bundle] * devices, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=wait_seconds)
    except GetTimeoutError:
        remove_placement_group(group)
        raise ConfigError(
            f"{wanted} were not free within {wait_seconds:g} s (the cluster has {counts}); end what holds them, or raise"
            " placement.options.wait_seconds"
        ) from None
    return group
