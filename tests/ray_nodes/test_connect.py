"""Joining and starting Ray: what is refused within seconds, what listens where, and that nothing outlives its run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from runner.cluster.ray import connect, environment
from runner.cluster.ray.here import VARIABLE
from runner.errors import UserError
from tests.ray_nodes.conftest import two_nodes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture
def address(connection: Any) -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _token() -> Path:
    return Path(os.environ[environment.TOKEN_PATH])


def test_a_token_that_is_wrong_missing_or_open_is_said_before_ray_is_asked(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    monkeypatch.setenv(environment.TOKEN_PATH, str(token))
    with pytest.raises(UserError, match="does not exist or is empty"):
        connect.check_cluster(address, insecure=False)
    token.write_text("wrong" * 12)
    with pytest.raises(UserError, match="does not take our token") as caught:
        connect.check_cluster(address, insecure=False)
    assert environment.TOKEN_PATH in str(caught.value.fix) and "wrongwrong" not in str(caught.value)
    token.chmod(0o644)
    with pytest.raises(UserError, match="others may read the token"):
        connect.check_cluster(address, insecure=False)


def test_the_right_token_is_taken(address: str) -> None:
    connect.check_cluster(address, insecure=False)


@pytest.mark.parametrize(("given", "match"), [("127.0.0.1:9", "nothing answers"), ("somewhere", "is no host:port")])
def test_an_address_where_nothing_is(given: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        connect.check_cluster(given, insecure=False)


def test_a_cluster_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer to a question without a token is the only sign; `test_the_right_token_is_taken` has the other answer."""
    asked: list[str | None] = []

    def asks(address: str, mode: str | None = None) -> str:
        asked.append(mode)
        return ""

    monkeypatch.setattr(connect, "_asks", asks)
    monkeypatch.setattr(connect.socket, "create_connection", lambda *given: connect.socket.socket())
    monkeypatch.setenv(environment.TOKEN, "x" * 32)
    with pytest.raises(UserError, match="asks for no token") as caught:
        connect.check_cluster("10.0.0.1:6379", insecure=False)
    assert asked == ["disabled"] and "cluster.insecure=true" in str(caught.value.fix)
    connect.check_cluster("10.0.0.1:6379", insecure=True)


def _ours(folder: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(VARIABLE) == folder:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_everything_listens_on_loopback_and_the_token_is_in_no_argument(launched: Any) -> None:
    launched(two_nodes())
    token = _token()
    assert token.stat().st_mode & 0o777 == 0o600
    processes = _ours(str(token.parent))
    names = {process.name() for process in processes}
    assert {"raylet", "gcs_server"} <= names
    listening = set()
    for process in processes:
        assert token.read_text() not in " ".join(process.cmdline())
        for one in process.net_connections(kind="inet"):
            if one.status == psutil.CONN_LISTEN:
                listening.add(one.laddr.ip.removeprefix("::ffff:"))  # the same address, through a socket of IPv6
    assert listening == {"127.0.0.1"}
    secret = token.read_text()
    for path in token.parent.rglob("*"):
        if path.is_file() and path != token:
            assert secret not in path.read_text(errors="replace"), path


PROGRAM = """
import os, sys, time
from runner.cluster.ray import RayLauncher
from tests.ray_nodes.conftest import two_nodes
cfg = two_nodes()
cfg.outputs_dir = sys.argv[1]
launcher = RayLauncher(cfg)
print(os.environ["RAY_AUTH_TOKEN_PATH"], *(node.where["pid"] for node in launcher.nodes.all()), flush=True)
print(*(node.where["weights"] for node in launcher.nodes.all()), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.night)])
def test_nothing_outlives_its_driver(tmp_path: Path, number: signal.Signals) -> None:
    """Neither processes nor folders, in shared memory or elsewhere; another cluster on the machine stays."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    driver = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=variables)
    assert driver.stdout is not None
    token, *pids = driver.stdout.readline().split()
    weights = [Path(folder) for folder in driver.stdout.readline().split()]
    folder = Path(token).parent
    assert len(pids) == 2 and len(_ours(str(folder))) > 8 and all(path.is_dir() for path in weights)
    driver.send_signal(number)
    driver.wait(timeout=60)
    deadline = time.monotonic() + 30
    while (folder.exists() or _ours(str(folder)) or any(map(Path.exists, weights))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not folder.exists() and not _ours(str(folder)) and not any(map(Path.exists, weights))


def test_nodes_with_gpus_are_not_started_from_here() -> None:
    from runner.config import compose

    with pytest.raises(UserError, match="8 nodes with GPUs are not started from here") as caught:
        connect.Connection(compose.load(["recipe=qwen3_235b_int4"]).config)
    assert "submit" in str(caught.value.fix)
