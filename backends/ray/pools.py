"""Pools of worker processes on Ray: one Ray actor per device, on one node or many."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, Concatenate

import ray
from pydantic import PositiveFloat
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlcore import registry
from rlcore.config.loader import validate
from rlcore.config.placement import PoolShape
from rlcore.config.schema import RunConfig
from rlcore.config.sections import Strict
from rlcore.device import Backend
from rlcore.errors import ConfigError, OutOfMemory, RlcoreError
from rlcore.model.resolved import ResolvedModel
from rlcore.monitor.heartbeat import ProcessHandle, publish
from rlcore.runtime import jemalloc
from rlcore.runtime.placement import Placement
from rlcore.runtime.pool import P, Pool, R, results
from rlcore.runtime.reward_worker import RewardWorker
from rlcore.runtime.shortage import recognized
from rlcore.runtime.watchdog import Watchdog
from rlcore.runtime.worker import Worker

from ..common import node_address
from . import debugging
from .observers import DEATHS, Observers, died
from .store import Outbox, Parcel, RayStore, unpacked, values


class RayOptions(Strict):
    """`placement.options` of kind ray."""

    address: str | None = None
    """Address of a running cluster; unset joins that of RAY_ADDRESS, or starts one on this machine that ends with the run."""
    wait_seconds: PositiveFloat = 300.0
    """Time to wait for the devices to be there and free."""


def open_pools(resolved: ResolvedModel, watchdog: Watchdog) -> Placement:
    """Start every pool of the run file with its workers. ConfigError when the cluster lacks the devices."""
    model = resolved.config.model.model_copy(update={"precision": resolved.precision})
    config = resolved.config.model_copy(update={"model": model})  # other nodes' CPUs might choose another
    options = validate(RayOptions, config.placement.options, "placement.options.")
    total = config.topology.devices
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
        for shape in config.topology.pools:
            opened.append(_Devices(config, backend, shape, options.wait_seconds, observers, store))
            trains = not shape.roles.isdisjoint({"actor", "reference"})
            pool = Pool(opened[-1].members, config.sharding.sequence_parallel if trains else 1, store)
            pools |= dict.fromkeys(shape.roles, pool)
        _connect_broadcast(pools["actor"], pools["rollout"])
        if config.placement.reward_workers:
            opened.append(_Scorers(config, observers, store))
            pools["reward"] = Pool(opened[-1].members, store=store)
        return Placement(config, pools, close, store)
    except BaseException:
        close()
        raise


class Process:
    """Ray actor that hosts one worker."""

    def __init__(self) -> None:
        self.outbox = Outbox()

    def show(self, who: str) -> tuple[str, ProcessHandle]:
        """Start the heartbeat; Ray's id of this node, and where observers on it find the heartbeat."""
        self.heartbeat, handle = publish(who, ray.util.get_node_ip_address())
        return ray.get_runtime_context().get_node_id(), handle

    def open(self, config: RunConfig, options: Any, roles: Sequence[str]) -> None:
        with self.heartbeat.stage("open"):
            resolved = ResolvedModel(config, registry.load("backends", config.backend.name)(options))
            self.worker = Worker(resolved, roles, self.heartbeat, self.outbox.put)
        from transformers.utils import logging  # after `prepare`, which makes it importable

        logging.disable_progress_bar()

    def open_rewards(self, config: RunConfig, path: Sequence[str]) -> None:
        """`path`: the controller's sys.path, which a reward may be imported from."""
        sys.path += [folder for folder in path if folder not in sys.path]
        self.worker = RewardWorker(config.reward)

    def rendezvous_address(self) -> str:
        """host:port with a free port of this node; an IPv6 address in brackets."""
        return node_address.free_endpoint(ray.util.get_node_ip_address())

    def join(self, rank: int, size: int, address: str) -> None:
        assert isinstance(self.worker, Worker), "reward workers have no ranks"
        for name, value in self.worker.resolved.backend.network(ray.util.get_node_ip_address()).items():
            os.environ.setdefault(name, value)
        with self.heartbeat.stage("join"):
            self.worker.join(rank, size, address)

    def call(self, method: str, arguments: Parcel) -> Parcel:
        args, kwargs = unpacked(arguments, values)
        with self.heartbeat.stage(method), recognized(self.worker, method, args):
            return self.outbox.answer(getattr(self.worker, method)(*args, **kwargs))

    def stream(self, method: str, arguments: Parcel) -> Iterator[Parcel]:
        args, kwargs = unpacked(arguments, values)
        with self.heartbeat.stage(method), recognized(self.worker, method, args):
            for item in getattr(self.worker, method)(*args, **kwargs):
                yield self.outbox.answer(item)


class Remote:
    """A pool member's proxy on the controller."""

    def __init__(self, process: Any, name: str, store: RayStore) -> None:
        self.process, self.name, self.store = process, name, store
        self.where, self.neighbours = "not started", 1
        self.starved: Callable[[], str] = str

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
        """Call a method of `Process` itself, not of its worker."""
        name = method.__name__
        return self._answer(name, getattr(self.process, name).remote(*args, **kwargs), lambda given: given)

    def _answer(self, method: str, asked: Any, read: Callable[[Any], Any]) -> Future[Any]:
        """Future of the process's answer after `read`."""
        answer: Future[Any] = Future()
        asked.future().add_done_callback(partial(self._resolve, answer, method, read))
        return answer

    def _resolve(self, answer: Future[Any], method: str, read: Callable[[Any], Any], done: Future[Any]) -> None:
        try:
            answer.set_result(read(done.result()))
        except Exception as error:  # explained in a thread that may wait for Ray, as its own, which calls this, may not
            caught = error
            threading.Thread(target=lambda: answer.set_exception(self._explained(caught, method)), daemon=True).start()

    def _explained(self, error: BaseException, method: str) -> BaseException:
        cause = getattr(error, "cause", None)
        if isinstance(cause, OutOfMemory):
            return OutOfMemory(replace(cause.shortage, who=f"{self.name} ({self.where})", neighbours=self.neighbours))
        if isinstance(cause, RlcoreError):
            return cause
        if not isinstance(error, DEATHS):
            return error
        return died(self.name, self.where, method, error, self.starved, self.neighbours)


def _show(members: Sequence[Remote], observers: Observers) -> None:
    """Register the members with the observers, and set their location for messages."""
    shown = results([member.ask(Process.show, member.name) for member in members])
    on_node = Counter(node for node, _ in shown)
    for member, (node, handle) in zip(members, shown, strict=True):
        member.where, member.neighbours = str(handle), on_node[node]
        observers.add(node, handle)
        member.starved = partial(observers.starved, node)


def _connect_broadcast(actor: Pool, rollout: Pool) -> None:
    """Open the weight-sync group between actor and engines, if they are in different pools."""
    if actor is not rollout:
        ends = [actor.members[0], *rollout.members]
        assert isinstance(ends[0], Remote), "of these pools every member is one"
        address = ends[0].ask(Process.rendezvous_address).result()
        results([end.call(Worker.connect_broadcast, rank, len(ends), address) for rank, end in enumerate(ends)])


class _Devices:
    """Workers of one pool and their Ray placement group."""

    def __init__(
        self, config: RunConfig, backend: Backend, shape: PoolShape, wait_seconds: float, observers: Observers, store: RayStore
    ) -> None:
        self._processes: list[Any] = []
        self._group = _reserved(dict(backend.device_resources()), shape.setting, shape.devices, wait_seconds)
        try:
            nodes = placement_group_table(self._group)["bundles_to_node_id"]
            neighbours = sorted(range(shape.devices), key=lambda bundle: (nodes[bundle], bundle))
            self._processes = [self._process(backend, bundle) for bundle in neighbours]
            self.members = self._started(config, backend, shape, observers, store)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Kill the processes and free their devices."""
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
        self, config: RunConfig, backend: Backend, shape: PoolShape, observers: Observers, store: RayStore
    ) -> list[Remote]:
        chosen = config.backend.model_copy(update={"name": backend.name})
        config = config.model_copy(update={"backend": chosen})
        size, kind = len(self._processes), " ".join(["worker", *shape.setting.split(".")[2:-1]])
        members = [Remote(process, f"{kind} {rank} of {size}", store) for rank, process in enumerate(self._processes)]
        _show(members, observers)
        results([member.ask(Process.open, config, backend.options, sorted(shape.roles)) for member in members])
        if size > 1:
            address = members[0].ask(Process.rendezvous_address).result()
            results([member.ask(Process.join, rank, size, address) for rank, member in enumerate(members)])
        return members


class _Scorers:
    """Reward workers: on any node, on the CPU time its devices leave; none is reserved."""

    def __init__(self, config: RunConfig, observers: Observers, store: RayStore) -> None:
        count = config.placement.reward_workers
        environment = {"env_vars": _inherited()}
        self._processes: list[Any] = [
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
    """Variables sent from this process to every worker: an existing cluster has its own environment."""
    return {**debugging.environment(os.environ), **jemalloc.inherited(os.environ)}


def _connect(options: RayOptions, backend: Backend, devices: int) -> bool:
    """Join or start Ray; whether this process started it."""
    address = options.address or os.environ.get("RAY_ADDRESS")
    started = not ray.is_initialized() and not address
    quiet = {"include_dashboard": False, "logging_level": logging.ERROR, "configure_logging": False}
    leave = signal.getsignal(signal.SIGTERM)
    try:
        if started:
            logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # silences the notice about its token
            cpus = backend.sharing(devices).device_resources().get("CPU", 1) * devices
            ray.init("local", num_cpus=max(os.cpu_count() or 1, int(cpus)), **quiet)
        elif not ray.is_initialized():
            ray.init(address, logging_level=logging.ERROR, configure_logging=False)
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
