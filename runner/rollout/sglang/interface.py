"""Where servers, router and weight broadcasts listen: one IPv4 address of this machine, from `cluster.interface`.

Imports no torch: rules and preflight ask here as well.
"""

from __future__ import annotations

import ipaddress
import socket

import psutil

from runner.config.choices import LauncherKind
from runner.config.schema import ClusterConfig
from runner.errors import UserError

LOOPBACK = "127.0.0.1"
KEY = "cluster.interface"
FAR_AWAY = ("10.254.254.254", 9)  # any address that no machine has itself: the kernel then names the interface it would use


def interfaces() -> dict[str, list[str]]:
    """Interface -> its IPv4 addresses."""
    found = {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def listen_address(cluster: ClusterConfig, otherwise: str | None = None) -> str:
    """The IPv4 address to listen on: loopback for a run of one machine, else of the named interface, or the given address;
    `otherwise`, or the one that reaches other machines, where a cluster names none. UserError when this machine does not have it.
    Never the wildcard: servers must not be open on every network."""
    wanted = cluster.interface
    if wanted is None:
        return LOOPBACK if cluster.launcher == LauncherKind.local else otherwise or _towards_the_network()
    there = interfaces()
    if wanted in there:
        return there[wanted][0]
    if any(wanted in addresses for addresses in there.values()):
        return wanted
    what = "address" if _is_address(wanted) else "network interface"
    raise UserError(
        f"this machine has no {what} {wanted} with IPv4; it has {', '.join(f'{name} ({ips[0]})' for name, ips in there.items())}",
        key=KEY,
        fix=f"{KEY}={next((name for name, ips in there.items() if ips[0] != LOOPBACK), 'null')}, or {KEY}=null for loopback",
    )


def name_of(address: str) -> str:
    """The interface that has this address; gloo and NCCL want names."""
    return next(name for name, addresses in interfaces().items() if address in addresses)


def wildcard(interface: str | None) -> bool:
    """0.0.0.0 and :: are every interface."""
    return interface is not None and _is_address(interface) and ipaddress.ip_address(interface).is_unspecified


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _towards_the_network() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # UDP: connecting sends nothing
        try:
            probe.connect(FAR_AWAY)
        except OSError as error:
            raise UserError(f"this machine reaches no other one: {error}", key=KEY, fix=f"{KEY}=<an interface>") from error
        return str(probe.getsockname()[0])
