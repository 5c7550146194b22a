"""cluster.interface: the one address that servers, router and weight broadcasts listen on. Needs no SGLang."""

from __future__ import annotations

import socket
import threading

import psutil
import pytest
import torch

from runner.config import compose, preflight
from runner.config.choices import LauncherKind
from runner.config.schema import ClusterConfig, Config
from runner.errors import UserError, UserErrors
from runner.rollout.sglang.interface import LOOPBACK, interfaces, listen_address, name_of, wildcard
from runner.weights.buckets import describe
from runner.weights.transports import broadcast

OUTSIDE = [(name, ips[0]) for name, ips in interfaces().items() if not ips[0].startswith("127.")]


def load(*overrides: str) -> Config:
    return compose.load_config(["model=tiny_moe", "rollout=sglang", "speculative=none", *overrides])


def cluster(interface: str | None = None, launcher: str = "local") -> ClusterConfig:
    found = load().cluster
    found.interface, found.launcher = interface, LauncherKind(launcher)
    return found


def test_one_machine_listens_on_loopback() -> None:
    assert listen_address(cluster()) == LOOPBACK and name_of(LOOPBACK) == "lo"


@pytest.mark.skipif(not OUTSIDE, reason="this machine has no network address")
def test_a_name_and_its_address_are_the_same_and_a_cluster_finds_its_own() -> None:
    name, address = OUTSIDE[0]
    assert listen_address(cluster(name)) == listen_address(cluster(address)) == address and name_of(address) == name
    assert listen_address(cluster(launcher="ray")) in [ip for ips in interfaces().values() for ip in ips]


@pytest.mark.parametrize(("interface", "kind"), [("eth99", "network interface"), ("203.0.113.77", "address")])
def test_what_this_machine_does_not_have_is_found_before_the_start(interface: str, kind: str) -> None:
    with pytest.raises(UserError, match=f"no {kind} {interface}"):
        listen_address(cluster(interface))
    with pytest.raises(UserErrors, match=f"no {kind} {interface}"):
        preflight.check(load(f"cluster.interface={interface}"))


def test_the_wildcard_is_known_in_both_families() -> None:
    assert wildcard("0.0.0.0") and wildcard("::") and not wildcard("eth0") and not wildcard("127.0.0.1") and not wildcard(None)


def test_a_router_that_is_not_installed_is_found_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    real = preflight.installed
    monkeypatch.setattr(preflight, "installed", lambda module: module != "sglang_router" and real(module))
    with pytest.raises(UserErrors, match="sglang-router is not installed") as caught:
        preflight.check(load("router_replay=none", "rollout.use_router=true"))
    assert "make setup-sglang" in str(caught.value)


@pytest.mark.promise("torch's rendezvous and gloo listen on every interface")
@pytest.mark.parametrize("host", [LOOPBACK, *(address for _, address in OUTSIDE[:1])])
def test_a_broadcast_listens_on_its_address_alone(host: str) -> None:
    """The store and gloo's own sockets; torch's defaults are every interface, and whatever the host name resolves to."""
    before = _listening()
    listener = socket.create_server((host, 0))
    meeting = broadcast.Meeting(host, listener.getsockname()[1], 2, "gloo", 20.0)
    tensors = [torch.arange(7, dtype=torch.int32), torch.ones(3, 2)]
    pieces = describe([("a", tensors[0]), ("b", tensors[1])])
    arrived: dict[str, torch.Tensor] = {}
    together = threading.Barrier(2)

    def receive() -> None:
        group = broadcast.join(meeting, 1, host)
        together.wait(20)
        arrived.update(broadcast.receive(group, pieces, torch.device("cpu")))

    receiver = threading.Thread(target=receive)
    receiver.start()
    group = broadcast.join(meeting, 0, host, listener)
    opened = _listening() - before
    together.wait(20)
    broadcast.send(group, tensors, torch.device("cpu"))
    receiver.join(20)
    assert torch.equal(arrived["a"], tensors[0]) and torch.equal(arrived["b"], tensors[1])
    assert opened and {ip for ip, _ in opened} == {host}


def _listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections("inet")
    return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}
