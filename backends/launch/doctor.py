"""Checks of `rlcore doctor` for `rlcore launch`: Ray, the head's ports, the route to the head, network interfaces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files

import psutil

from rlcore.checks import CheckResult, compared
from rlcore.diagnose.host import installed, read_pins
from rlcore.errors import ConfigError

from ..common import node_address


def check_results(environment: Mapping[str, str], ports: Mapping[str, int]) -> Iterator[CheckResult]:
    """ports: the variables of the head's ports, each with its default."""
    yield _ray()
    if not environment.get("RAY_ADDRESS"):  # in an existing cluster nothing is started
        yield from (_port(name, environment.get(name), default) for name, default in ports.items())
    yield _head(environment)
    for name, value in environment.items():
        if name.endswith("_SOCKET_IFNAME"):
            yield _interface(name, value)


def _ray() -> CheckResult:
    version = installed("ray")
    if version is None:
        remedy = "for several devices: pip install --no-deps -r requirements/ray.txt"
        return CheckResult("ray", "absent", f"several devices or nodes need it; {remedy}")
    pin = read_pins(files("rlcore_requirements") / "ray.txt")["ray"]
    return compared("ray", version, str(pin.specifier), "", f"pip install --no-deps '{pin}'")


def _port(name: str, said: str | None, default: int) -> CheckResult:
    """Check a port; a failure only where it was set explicitly, since without a launch it is not used."""
    try:
        port = int(said or default)
        node_address.refuse_taken(port, name)
    except (ValueError, OverflowError):
        return CheckResult(name, "failure", f"{said!r} is no port", f"{name}=1024 ... 65535, or unset it")
    except ConfigError as error:
        return CheckResult(name, "failure" if said else "warning", str(error), f"{name}=<another>, the same on every node")
    return CheckResult(name, "ok", f"port {port} is free")


def _head(environment: Mapping[str, str]) -> CheckResult:
    """Check MASTER_ADDR, and by which interface it is reached."""
    said, nodes = environment.get("MASTER_ADDR"), environment.get("NNODES", "1")
    if not said:
        if nodes in ("", "1"):
            return CheckResult("MASTER_ADDR", "absent", "only several nodes need it")
        return CheckResult("MASTER_ADDR", "failure", f"not set, and NNODES is {nodes}", "set the head's address on every node")
    try:
        master = node_address.resolve(said, "MASTER_ADDR")
        if nodes not in ("", "1"):
            node_address.refuse_loopback(master, said, "MASTER_ADDR")
        own = node_address.towards(master, "MASTER_ADDR")
    except ConfigError as error:
        return CheckResult(
            "MASTER_ADDR", "failure", str(error), "give an address of the head on the network that the nodes share"
        )
    return CheckResult("MASTER_ADDR", "ok", f"{master} is reached by {node_address.interface(own) or 'an interface'} as {own}")


def _interface(name: str, value: str) -> CheckResult:
    """Check an interface setting of collectives: a list of name prefixes; ^ excludes, = asks for the whole name."""
    there = sorted(psutil.net_if_addrs())
    wanted = [] if value.startswith("^") else [part.partition(":")[0] for part in value.removeprefix("=").split(",") if part]
    if missing := [part for part in wanted if not any(known.startswith(part) for known in there)]:
        remedy = f"unset {name}, or name one of {', '.join(there)}"
        return CheckResult(name, "failure", f"no interface here is called {', '.join(missing)}", remedy)
    return CheckResult(name, "ok", value)
