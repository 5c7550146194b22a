"""One SGLang server: a process of its own, its log file, its end."""

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
from typing import Any

from runner.errors import UserError

STUBS = Path(__file__).parent / "stubs"
LOG_TAIL_BYTES = 200_000
GRACE_SECONDS = 20.0  # SGLang gives its schedulers 15 s to give memory back; killed earlier they may leave it on the GPU


class Server:
    """`start` returns as soon as the process runs; whether it answers is the client's to find out.

    The process ends with this one, however this one ends: see entry.py.
    """

    def __init__(self, index: int, arguments: dict[str, Any], *, host: str, api_key: str, log: Path, threads: int) -> None:
        self.index, self.host, self.log = index, host, log
        self.port = 0
        self.arguments = arguments
        self.threads = threads
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
        """Pick free ports and start the process; its output goes to the end of the log file."""
        self.port, nccl_port = free_ports(self.host, 2)
        self.launch({"host": self.host, "port": self.port, "nccl_port": nccl_port})

    def launch(self, ports: dict[str, Any]) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "runner.rollout.sglang.entry"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,  # Ctrl-C on the terminal is the driver's to handle
            )
        asked = {"server_args": {**self.arguments, **ports}, "api_key": self._api_key}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; `failure` says why
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def failure(self) -> str:
        """Why it ended, from its log: the last error, or the exit code."""
        code = self._process.poll() if self._process else None
        ended = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return last_error(self.log) or ended

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

    def _environment(self) -> dict[str, str]:
        env = dict(os.environ)
        env |= {
            "RUNNER_SGLANG_SERVER": "1",
            "SGLANG_PLUGINS": env.get("SGLANG_PLUGINS", "runner"),
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # see context_length in arguments.py
            "HF_HUB_OFFLINE": "1",  # the folder of the model is local and complete
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        if self.arguments["device"] == "cpu":
            env |= {
                "SGLANG_USE_CPU_ENGINE": "1",
                "TORCHDYNAMO_DISABLE": "1",
                "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", str(self.threads)),
                "OMP_WAIT_POLICY": "PASSIVE",  # trainer and servers share the cores: waiting threads must not spin
                "PYTHONPATH": os.pathsep.join([str(STUBS), *filter(None, [env.get("PYTHONPATH")])]),
            }
        return env


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


# What a log says when a start failed -> what to tell the user.
KNOWN_FAILURES = (
    (re.compile(r"address already in use", re.I), "another program took its port"),
    (re.compile(r"(out of memory|not enough memory|MemoryError|can't allocate memory).*", re.I), "it ran out of memory"),
)


def last_error(log: Path) -> str:
    """The last line of the log that names an error; "" when there is none."""
    try:
        with log.open("rb") as opened:
            opened.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            lines = opened.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    for pattern, meaning in KNOWN_FAILURES:
        if any(pattern.search(line) for line in lines):
            return meaning
    errors = [line.strip() for line in lines if re.match(r"\s*(\w+\.)*\w*(Error|Exception|error)\b.*: ?\S", line)]
    return errors[-1] if errors else ""


def start_problem(server: Server, seconds: float) -> UserError:
    """For a server that ended or did not answer while it started."""
    if server.alive():
        what = f"SGLang server {server.index} did not answer within {seconds:.0f} s"
        fix = f"look at {server.log}; a large model needs a larger rollout.startup_timeout_seconds"
    else:
        what = f"SGLang server {server.index} did not start: {server.failure()}"
        fix = f"look at {server.log}"
        if "memory" in server.failure():
            fix = f"a smaller rollout.memory_fraction or rollout.max_concurrency; the log is {server.log}"
    return UserError(what, key="rollout", fix=fix)


def threads_per_engine(engines: int) -> int:
    """CPU threads of each server when `engines` of them share this machine."""
    return max(1, len(os.sched_getaffinity(0)) // engines)
