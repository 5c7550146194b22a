"""A process that the pool starts and that ends with it: a server, or the router in front of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from runner.errors import UserError

LOG_TAIL_BYTES = 200_000
GRACE_SECONDS = 20.0  # SGLang gives its schedulers 15 s to give memory back; killed earlier they may leave it on the GPU


class Child:
    """`python -m <module>` with its output at the end of a log file; what it must know comes as one line of JSON on stdin.

    The process ends with this one, however this one ends: see entry.py. `start` returns as soon as it runs; whether it
    answers is the client's to find out.
    """

    title = "process"
    module = ""

    def __init__(self, *, host: str, api_key: str, log: Path) -> None:
        """`host`: the IPv4 address that it listens on."""
        self.host, self.log = host, log
        self.port = 0
        self._log_start = 0  # of the latest start, in bytes
        self._api_key = api_key
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # the token of a cluster
        return {**inherited, "PYTHONUNBUFFERED": "1"}

    def launch(self, asked: dict[str, Any]) -> None:
        """Start the process and tell it `asked` and the key."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,  # Ctrl-C on the terminal is the driver's to handle
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; `failure` says why
            self._process.stdin.write(json.dumps({**asked, "api_key": self._api_key}).encode() + b"\n")
            self._process.stdin.flush()

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def failure(self) -> str:
        """Why it ended, from its log since it was started: the last error, or the exit code."""
        code = self._process.poll() if self._process else None
        ended = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return last_error(self.log, self._log_start) or ended

    def stop(self) -> None:
        """Ask, wait, then kill the process and all it started."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            deadline = time.monotonic() + GRACE_SECONDS
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole process group; returns when the process is gone."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        self._process = None


def free_ports(host: str, count: int) -> list[int]:
    """Ports that nobody listens on, all different. Another program may still take one before the server does: it then
    says so in its log, and the pool starts it again with others."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            opened = stack.enter_context(socket.socket())
            opened.bind((host, 0))
            ports.append(opened.getsockname()[1])
        return ports


PORT_TAKEN = "another program took its port"  # worth another start, with other ports
# What a log says when a start failed -> what to tell the user.
KNOWN_FAILURES = (
    (re.compile(r"address already in use", re.I), PORT_TAKEN),
    (
        re.compile(r"out of memory|not enough memory|leave no GPU memory|MemoryError|can't allocate memory", re.I),
        "it ran out of memory",
    ),
)


NAMES_AN_ERROR = re.compile(r"\s*(\w+\.)*\w*(Error|Exception|error)\b.*: ?\S")
CHAINS = "exception"  # "During handling of the above exception, ...", "The above exception was the direct cause ..."
HARMLESS = "with url: /freeze_gc"


def last_error(log: Path, start: int) -> str:
    """The last line of the log, from this byte on, that names an error; "" when there is none."""
    try:
        with log.open("rb") as opened:
            opened.seek(max(start, log.stat().st_size - LOG_TAIL_BYTES))
            lines = opened.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    for pattern, meaning in KNOWN_FAILURES:
        if any(pattern.search(line) for line in lines):
            return meaning
    errors = [line.strip() for line in without_harmless(lines) if NAMES_AN_ERROR.match(line)]
    return errors[-1] if errors else ""


def without_harmless(lines: list[str]) -> list[str]:
    """The lines without tracebacks, each with those that it goes on from, that end with an error known to mean nothing: SGLang
    asks itself to freeze its garbage collector before it listens, since its own warm-up is skipped."""
    kept: list[str] = []
    start = 0  # in `kept`, of the chain of tracebacks that the line belongs to
    for line in lines:
        if line.startswith("Traceback (most recent call last)") and not any(CHAINS in said for said in kept[-3:]):
            start = len(kept)
        kept.append(line)
        if NAMES_AN_ERROR.match(line) and HARMLESS in line:
            del kept[start:]
    return kept


class Started(Protocol):
    """A process that was started here or on another node."""

    title: str
    log: Path

    def alive(self) -> bool: ...

    def failure(self) -> str: ...


def start_problem(child: Started, seconds: float) -> UserError:
    """For a process that ended or did not answer while it started."""
    fix = f"look at {child.log}"
    if child.alive():
        what = f"{child.title} did not answer within {seconds:.0f} s"
        fix += "; a large model needs a larger rollout.startup_timeout_seconds"
    else:
        what = f"{child.title} did not start: {child.failure()}"
        if "memory" in child.failure():
            fix = f"a smaller rollout.memory_fraction or rollout.max_concurrency; the log is {child.log}"
    return UserError(what, key="rollout", fix=fix)
