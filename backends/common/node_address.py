"""The address by which the other nodes of a run reach this one. Errors name the variable that was wrong: `key`."""

from __future__ import annotations

import ipaddress
import socket

from rlcore.errors import ConfigError


def resolve(name: str, key: str) -> str:
    """Address of a host name, IPv4 preferred; an address is returned as it is."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"{key}: {name!r} has no address here: {error.strerror}") from None
    families = {family: place[0] for family, *_, place in reversed(found)}
    return str(families.get(socket.AF_INET) or families[socket.AF_INET6])


def towards(address: str, key: str) -> str:
    """Source address of this node's route to `address`: the one that its neighbours reach. Nothing is sent."""
    with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # any port: the kernel only looks up its routes
        except OSError as error:
            raise ConfigError(f"{key}: no way from this node to {address}: {error.strerror}") from None
        return str(probe.getsockname()[0])


def refuse_loopback(address: str, said: str, key: str) -> None:
    """ConfigError for a loopback or unspecified address, which every node would take for itself."""
    parsed = ipaddress.ip_address(address)
    if parsed.is_loopback or parsed.is_unspecified:
        here = said if said == address else f"{said} is {address} here, and that"
        raise ConfigError(
            f"{key}: {here} is no address that other nodes reach: on each of them it means that node itself. Give the address "
            "on the network that the nodes share, for example 10.0.0.1"
        )


def refuse_foreign(address: str, key: str) -> None:
    """ConfigError when it is another machine's address."""
    with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise ConfigError(f"{key}: {address} is not an address of this node: {error.strerror}") from None


def refuse_taken(port: int, key: str) -> None:
    """ConfigError when something on this node listens there already."""
    dual = socket.has_dualstack_ipv6()
    try:
        socket.create_server(("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual).close()
    except OSError as error:
        raise ConfigError(f"{key}: port {port} of this node is not free ({error.strerror}); choose another") from None


def endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def free_endpoint(address: str) -> str:
    """Endpoint with a free port at this address of the node."""
    with socket.create_server((address, 0), family=_family(address)) as free:
        return endpoint(address, free.getsockname()[1])


def interface(address: str) -> str | None:
    """The network interface of this node that has the address."""
    import psutil

    named = {entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries}
    return named.get(address)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
