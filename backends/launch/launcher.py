"""`rlcore launch`: settings of a run over several nodes, and this node's part in it, head or follower."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt

from rlcore.checks import CheckResult
from rlcore.config.loader import validate
from rlcore.config.sections import Strict
from rlcore.errors import ConfigError, PluginError
from rlcore.runtime import jemalloc
from rlcore.runtime.signals import Interruption

from ..common import node_address
from . import cluster, doctor, lifecycle

if TYPE_CHECKING:
    from rlcore.device import Backend

DEVICES = ("DEVICES_PER_NODE", "NPUS_PER_NODE", "GPUS_PER_NODE")

Port = Annotated[int, Field(ge=0, le=65535)]


class LaunchOptions(Strict):
    """Each is an environment variable (RAY_PORT) and an option of `rlcore launch` (--ray-port)."""

    model_config = ConfigDict(alias_generator=str.upper, use_attribute_docstrings=True)

    nnodes: PositiveInt = 1
    """nodes of the run, the head included"""
    devices_per_node: PositiveInt
    """devices that each node gives; NPUS_PER_NODE and GPUS_PER_NODE say the same"""
    master_addr: str | None = None
    """the head: its address, or a name that means it on every node; one node needs none"""
    current_ip: str | None = None
    """this node's address; when not set, the one by which it reaches the head"""
    wait_seconds: PositiveFloat = 600
    """how long the head waits for the nodes, and a node for the head"""
    ray_port: Annotated[int, Field(ge=1024, le=65535)] = 6766
    """where the head listens"""
    node_manager_port: Port = 0
    """of each node, towards the others; 0 is any free one"""
    object_manager_port: Port = 0
    """of each node, towards the others; 0 is any free one"""
    worker_ports: Annotated[str, Field(pattern=r"^\d+-\d+$")] = "0-0"
    """LOW-HIGH, of each node's worker processes; 0-0 is any free ones"""
    dashboard_host: str = "127.0.0.1"
    """where Ray's dashboard listens: 127.0.0.1 is for the head itself, 0.0.0.0 for everyone"""
    dashboard_port: Port = 8260
    """0 is any free one"""
    ray_temp_dir: Path | None = None
    """Ray's sockets and logs; when not set, a new folder in /tmp, removed after success"""
    jemalloc: str = "auto"
    """malloc of all processes: auto is jemalloc where it is found, off the system's own; else the path of a libjemalloc.so.2"""
    token_stdin: bool = False
    """read the cluster's token from standard input"""


class RayLauncher:
    """Runs one node's part: the head's where its address is MASTER_ADDR; in an existing cluster, only the trainer."""

    Options: ClassVar[type[LaunchOptions]] = LaunchOptions

    def __init__(self, given: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """given: values by variable name; they override the environment."""
        if importlib.util.find_spec("ray") is None:
            raise PluginError("ray is not installed; pip install --no-deps -r requirements/ray.txt, on every node")
        self._environment = dict(environment)
        self._cluster = environment.get("RAY_ADDRESS")
        known = [field.alias for field in LaunchOptions.model_fields.values()]
        values = {name: environment[name] for name in known if name and environment.get(name)}
        self._options = None if self._cluster else validate(LaunchOptions, {**values, **_devices(environment), **given})
        self._jemalloc = str({**values, **given}.get("JEMALLOC", LaunchOptions.model_fields["jemalloc"].default))

    @classmethod
    def check_results(cls, environment: Mapping[str, str]) -> Iterator[CheckResult]:
        """Checks of this node for `rlcore doctor`, before torch is imported."""
        fields = cls.Options.model_fields
        ports = {str(fields[name].alias): fields[name].default for name in ("ray_port", "dashboard_port")}
        return doctor.check_results(environment, ports)

    @property
    def devices(self) -> int | None:
        """Devices of all nodes; None in an existing cluster, which may have more than the run needs."""
        return self._options and self._options.nnodes * self._options.devices_per_node

    def run(self, trainer: Sequence[str], backend: Backend) -> int:
        """Run this node's part; the trainer's exit status, on every node."""
        if self._options is None:
            return self._visit(trainer)
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # silences the head's disconnect at the end
        options = self._options
        master, current = _addresses(options)
        environment = {**self._environment, **_additions(options, self._environment), **self._malloc()}
        device = backend.sharing(options.devices_per_node).device_resources()
        resources = {name: amount * options.devices_per_node for name, amount in device.items()}
        setup = lifecycle.NodeSetup(
            options.nnodes, resources, current, node_address.endpoint(master, options.ray_port), options.wait_seconds,
            environment, _arguments(options, resources), options.ray_temp_dir,
        )  # fmt: skip
        with Interruption():
            return self._lead(setup, trainer) if master == current else lifecycle.follow(setup)

    def _lead(self, setup: lifecycle.NodeSetup, trainer: Sequence[str]) -> int:
        assert self._options is not None
        node_address.refuse_taken(self._options.ray_port, "RAY_PORT")
        node_address.refuse_taken(self._options.dashboard_port, "DASHBOARD_PORT")
        cluster.create_token(cluster.token_file(setup.environment))
        places = [f"--dashboard-host={self._options.dashboard_host}", f"--dashboard-port={self._options.dashboard_port}"]
        return lifecycle.lead(setup, trainer, self._options.ray_port, places)

    def _visit(self, trainer: Sequence[str]) -> int:
        """Train in the cluster that RAY_ADDRESS names, and leave it as it is."""
        lifecycle.say(f"RAY_ADDRESS: trains in the cluster at {self._cluster}, which is neither started nor stopped here")
        file = cluster.token_file(self._environment)
        added = {} if "RAY_AUTH_MODE" in self._environment or not cluster.there(file) else {"RAY_AUTH_MODE": "token"}
        with Interruption():
            return lifecycle.train(trainer, {**self._environment, **added, **self._malloc()})

    def _malloc(self) -> dict[str, str]:
        """Malloc variables for all processes started here; JEMALLOC tells the trainer that messages were already shown."""
        added, said = jemalloc.preload(self._jemalloc, self._environment)
        if said:
            lifecycle.say(said)
        return {**added, "JEMALLOC": self._jemalloc}


def _devices(environment: Mapping[str, str]) -> dict[str, str]:
    said = {name: environment[name] for name in DEVICES if environment.get(name)}
    if len(set(said.values())) > 1:
        raise ConfigError(f"{' and '.join(f'{name}={value}' for name, value in said.items())} differ; set one of them")
    return dict.fromkeys(DEVICES[:1], *set(said.values())) if said else {}


def _addresses(options: LaunchOptions) -> tuple[str, str]:
    """(head address, this node's address); ConfigError when a run cannot use them."""
    if options.master_addr is None and options.nnodes > 1:
        raise ConfigError(f"MASTER_ADDR: {options.nnodes} nodes must know the head; set its address, the same on every node")
    given = node_address.resolve(options.current_ip, "CURRENT_IP") if options.current_ip else None
    master = node_address.resolve(options.master_addr, "MASTER_ADDR") if options.master_addr else given or "127.0.0.1"
    if options.nnodes > 1:
        node_address.refuse_loopback(master, options.master_addr or master, "MASTER_ADDR")
    current = given or node_address.towards(master, "MASTER_ADDR")
    if options.nnodes > 1:
        node_address.refuse_loopback(current, options.current_ip or current, "CURRENT_IP")
    elif master != current:
        raise ConfigError(f"MASTER_ADDR: {master} is not this node ({current}) and NNODES is 1; set NNODES on every node")
    node_address.refuse_foreign(current, "CURRENT_IP")
    return master, current


def _additions(options: LaunchOptions, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for all processes started here."""
    if environment.get("RAY_AUTH_MODE", "token") != "token":
        raise ConfigError(
            f"RAY_AUTH_MODE: {environment['RAY_AUTH_MODE']} lets everyone who reaches the head's port run programs on every "
            "node; unset it"
        )
    added = {
        "RAY_AUTH_MODE": "token",
        "RAY_START_HOOK": f"{cluster.__name__}.without_client_server",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # when Ray is stopped, the trainer is done
    }
    if options.token_stdin:
        added["RAY_AUTH_TOKEN"] = sys.stdin.readline().strip()
        if not added["RAY_AUTH_TOKEN"]:
            raise ConfigError("TOKEN_STDIN: standard input gives no token; redirect it from the head's token file")
    return added


def _arguments(options: LaunchOptions, resources: Mapping[str, float]) -> list[str]:
    """Arguments of `ray start`, on every node."""
    low, _, high = options.worker_ports.partition("-")
    named = {"CPU": "--num-cpus", "GPU": "--num-gpus"}
    return [
        *(f"{named[name]}={amount:g}" for name, amount in resources.items() if name in named),
        f"--resources={json.dumps({name: amount for name, amount in resources.items() if name not in named})}",
        f"--node-manager-port={options.node_manager_port}", f"--object-manager-port={options.object_manager_port}",
        f"--min-worker-port={low}", f"--max-worker-port={high}", "--dashboard-agent-listen-port=0",
    ]  # fmt: skip
