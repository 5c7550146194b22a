"""Ranks on a CPU are forked from one process that has imported torch and Megatron: a start costs no import of eight seconds.

The server (`python -m runner.trainer.megatron.forkserver FD`) only imports: it computes nothing and has one thread, so that what
it forks is whole. It dies with the process that started it, and its ranks die with it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from runner.trainer.megatron import process

_STATUS_BYTES = 4
_MESSAGE_BYTES = 1 << 20  # of an environment

_server: _Server | None = None


class Forked:
    """A forked process; as much of subprocess.Popen as ranks.py needs."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid, self._status = pid, status
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, -N for signal N; None while it runs."""
        return self._code_within(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        code = self._code_within(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send it; a process that has ended gets nothing."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and its server has not told yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _code_within(self, seconds: float | None) -> int | None:
        if self._code is None and select.select([self._status], [], [], seconds)[0]:
            data = os.read(self._status, _STATUS_BYTES)
            os.close(self._status)
            # nothing: the server is dead, and the kernel killed what it had forked
            self._code = int.from_bytes(data, "little", signed=True) if data else -signal.SIGKILL
        return self._code


def fork(environment: dict[str, str], connection: int, log: Path) -> Forked:
    """A new process with the whole environment given, which serves `connection` and prints into `log`.

    The first call starts the server. Raises EOFError when the server does not answer: `log` says why.
    """
    global _server
    if _server is None or _server.process.poll() is not None:
        _server = _Server(environment, log)
    with log.open("ab") as output:
        return _server.fork(environment, connection, output.fileno())


class _Server:
    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                env=environment | {"OMP_NUM_THREADS": "1"},  # no threads before a fork
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C and a scheduler's SIGTERM reach the whole group
            )

    def fork(self, environment: dict[str, str], connection: int, output: int) -> Forked:
        status, theirs = os.pipe()
        try:
            socket.send_fds(self._channel, [json.dumps(environment).encode()], [connection, output, theirs])
            answer = self._channel.recv(8)
        except OSError:
            answer = b""
        finally:
            os.close(theirs)
        if not answer:
            os.close(status)
            self.process.wait()
            raise EOFError
        return Forked(int.from_bytes(answer, "little"), status)


# ---- the server's side


def main(descriptor: int) -> int:
    """Fork on request; returns when the other end of `descriptor` closes."""
    process.die_with_parent()
    process.ignore_signals()
    process.preload()
    channel = socket.socket(fileno=descriptor)
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    statuses: dict[int, int] = {}  # pid -> where its exit code goes
    gc.freeze()  # collecting would write to pages that ranks share
    while True:
        ready, _, _ = select.select([channel.fileno(), ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            _reap(statuses)
        if channel.fileno() in ready:
            message, descriptors, _, _ = socket.recv_fds(channel, _MESSAGE_BYTES, 3)
            if not message:
                return 0
            connection, output, status = descriptors
            pid = os.fork()
            if not pid:
                for other in (channel.fileno(), ended, wake, status, *statuses.values()):
                    os.close(other)
                _run(json.loads(message), connection, output)
            os.close(connection)
            os.close(output)
            statuses[pid] = status
            channel.send(pid.to_bytes(8, "little"))


def _reap(statuses: dict[int, int]) -> None:
    for pid in list(statuses):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            where = statuses.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(BrokenPipeError):  # nobody asks any more
                os.write(where, code.to_bytes(_STATUS_BYTES, "little", signed=True))
            os.close(where)


def _run(environment: dict[str, str], connection: int, output: int) -> None:
    """The child: what a fresh process would find, then the rank. Does not return."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None  # read from the environment again
        code = process.main(connection)
    except BaseException:
        traceback.print_exc()
    finally:
        process.leave(code)


if __name__ == "__main__":
    process.leave(main(int(sys.argv[1])))
