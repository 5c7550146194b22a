"""Joining a Ray that runs, or starting one here: with a token always, on loopback where it is this machine alone."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from runner.cluster.ray import environment
from runner.cluster.ray.environment import KEY, TOKEN_FIX, TOKEN_PROBLEM
from runner.cluster.ray.here import VARIABLE
from runner.cluster.ray.store import needed_bytes
from runner.config.schema import Config
from runner.errors import Failure, UserError

CONNECT_SECONDS = 5.0
START_SECONDS = 180.0  # for a node of this machine to come up
_LONGEST_FOLDER = 40  # characters: a socket's path has at most 107, and Ray adds 64


class Connection:
    """This process in a Ray cluster; `close` leaves it, and ends what was started here. Nothing else is ever ended."""

    def __init__(self, cfg: Config) -> None:
        self._holder: subprocess.Popen[str] | None = None  # of nodes that were started here
        self._set: list[str] = []
        self._joined = False
        address = cfg.cluster.address
        try:
            if address is None:
                address = self._start(cfg)
            else:
                check_cluster(address, insecure=cfg.cluster.insecure)
            self._join(address)
        except BaseException:
            self.close()
            raise

    @property
    def here(self) -> bool:
        """Whether every node was started here."""
        return self._holder is not None

    def listening(self) -> str:
        """One line: what listens where."""
        if self.here:
            return "Ray's nodes are of this machine and listen on 127.0.0.1 alone, with a token of this run"
        if os.environ.get(environment.MODE) == "token":
            return "Ray listens on every interface of its nodes, with a token, unencrypted: keep it on a network of your own"
        return "Ray listens on every interface of its nodes WITHOUT A TOKEN (cluster.insecure=true): whoever reaches it runs code"

    def _start(self, cfg: Config) -> str:
        """Nodes of this machine: one, or on a CPU as many as the run has; their address."""
        on_gpus = bool(cfg.parallelism.gpus + cfg.parallelism.rollout_gpus)
        if on_gpus and cfg.cluster.nodes > 1:
            raise UserError(
                f"{cfg.cluster.nodes} nodes with GPUs are not started from here",
                key=KEY,
                fix=f"{KEY}=<host:port of a running Ray>; `runner submit` writes a job that starts one",
            )
        root = tempfile.gettempdir() if len(tempfile.gettempdir()) + 12 <= _LONGEST_FOLDER else "/tmp"
        folder = Path(tempfile.mkdtemp(prefix="rr", dir=root))
        (folder / "ray").mkdir()  # Ray writes the cluster's address there, and does not make it
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        shared = {environment.MODE: "token", environment.TOKEN_PATH: str(token), **environment.LOOPBACK_ONLY}
        os.environ.pop(environment.TOKEN, None)
        self._set = list(shared)
        environment.settle(shared)
        self._holder = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "runner.cluster.ray.here",
                str(folder),
                str(cfg.cluster.nodes),
                "GPU" if on_gpus else "CPU",
                str(needed_bytes(cfg)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {VARIABLE: str(folder)},
            start_new_session=True,
        )
        for _ in range(cfg.cluster.nodes):
            address = self._told()
        return address

    def add_node(self) -> None:
        """One node of this machine more."""
        assert self._holder is not None and self._holder.stdin is not None
        self._holder.stdin.write("another\n")
        self._holder.stdin.flush()
        self._told()

    def _told(self) -> str:
        """The address, said again for each node that is up."""
        assert self._holder is not None and self._holder.stdout is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if not select.select([self._holder.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                break
            line = self._holder.stdout.readline()
            if not line:
                raise Failure("Ray did not start on this machine: above is why", key="cluster")
            if re.fullmatch(r"[0-9.]+:[0-9]+\n", line):  # Ray itself prints here as well
                return line.strip()
        raise Failure(f"Ray did not start on this machine within {START_SECONDS:g} s", key="cluster")

    def _join(self, address: str) -> None:
        import ray

        if ray.is_initialized():
            raise UserError("this process is in a Ray cluster already", key=KEY)
        with _own_handlers():
            ray.init(address=address, namespace="runner", log_to_driver=False, logging_level=logging.ERROR)
        self._joined = True

    def close(self) -> None:
        """Safe to call again."""
        if self._joined:  # a connection that failed must not end another one of this process
            import ray

            self._joined = False

            with contextlib.suppress(Exception), _own_handlers():
                ray.shutdown()
        holder, self._holder = self._holder, None
        if holder is not None:
            assert holder.stdin is not None and holder.stdout is not None
            with contextlib.suppress(OSError):
                holder.stdin.close()
            holder.wait()
            holder.stdout.close()
            for name in self._set:
                os.environ.pop(name, None)


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Ray takes SIGTERM when it starts; whoever had it gets it back. Off the main thread nobody can."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            for number, handler in before.items():
                signal.signal(number, handler)


def check_cluster(address: str, *, insecure: bool) -> None:
    """UserError within seconds for an address where nothing listens, a token that is missing or wrong, another Ray, or a cluster
    that asks for no token."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise UserError(f"{address} is no host:port", key=KEY, fix=f"{KEY}=10.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at {address}: {error}", key=KEY, fix="ray start --head there, or `runner submit`"
        ) from None
    environment.check_token(insecure=insecure)
    environment.settle({})
    if not insecure and _asks(address, mode="disabled") == "":
        raise UserError(
            f"the Ray cluster at {address} asks for no token: whoever reaches it runs code on every node",
            key=KEY,
            fix=f"start its nodes with {environment.MODE}=token and {environment.TOKEN_PATH}, or cluster.insecure=true",
        )
    problem = _asks(address)
    if "InvalidAuthToken" in problem:
        raise UserError(TOKEN_PROBLEM.format(address=address), key=KEY, fix=TOKEN_FIX)
    if problem:
        raise UserError(f"the Ray cluster at {address} does not answer: {problem}", key=KEY)


_PROBE = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)
except Exception as error:
    print(type(error).__name__, error)
"""


def _asks(address: str, mode: str | None = None) -> str:
    """What the cluster says to one question, "" when it answers. A process of its own: Ray reads the token once, and ends the
    process where it finds none."""
    variables = {environment.MODE: mode} if mode else {}
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, address],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {time.monotonic() - began:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it ended"])[0][:300]
    return done.stdout.strip()[:300]
