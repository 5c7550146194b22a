"""Starting, calling and ending the rank processes of one machine; a dead or silent rank is found within a bounded time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from runner import scratch
from runner.config.schema import Config
from runner.errors import Failure, UserError
from runner.precision import cpu_matmul
from runner.trainer.megatron import arguments, forkserver, wire
from runner.trainer.protocol import TrainerLost

LOG_LINES = 12  # of a dead rank's output that the error shows
STACK_SECONDS = 0.3  # for a silent rank to say where it stands


class RankFailure(TrainerLost):
    """A rank died, fell silent or raised; the other ranks have been ended."""


class LocalRanks:
    """The rank processes of `cluster=local`. Every call goes to all of them; they answer in any order.

    The processes die with this one: their socket closes, and the kernel kills them if this process is killed.
    """

    def __init__(self, cfg: Config, run_dir: Path | None = None) -> None:
        self.cfg = cfg
        self.timeout = arguments.trainer_config(cfg).rank_timeout_seconds
        self._scratch = scratch.make("runner-ranks-")
        self._logs = run_dir / "logs" if run_dir else self._scratch
        self._processes: list[subprocess.Popen[bytes] | forkserver.Forked] = []
        self._connections: list[Connection] = []
        try:
            for rank in range(arguments.world_size(cfg)):
                self._spawn(rank)
            rendezvous = f"file://{self._scratch}/rendezvous"
            for rank, connection in enumerate(self._connections):
                wire.send(connection, (cfg, rank, rendezvous, rank))
            self._collect("starting")
        except BaseException:
            self.close()
            raise

    def _spawn(self, rank: int) -> None:
        environment = (
            os.environ
            | scratch.environment(self._scratch)
            | arguments.environment(self.cfg)
            | cpu_matmul.environment(self.cfg.precision.cpu_matmul)
        )
        ours, theirs = socket.socketpair()
        self._connections.append(Connection(ours.detach()))
        with theirs:
            if arguments.Device.of(self.cfg).cuda:
                self._processes.append(_fresh(environment, theirs.fileno(), self.log(rank)))
                return
            try:
                self._processes.append(forkserver.fork(environment, theirs.fileno(), self.log(rank)))
            except EOFError:
                raise RankFailure(f"trainer rank {rank} could not be started{self._tail(rank)}") from None

    def log(self, rank: int) -> Path:
        """Everything that a rank printed; in the run's logs/ where there is a run."""
        return self._logs / f"trainer_rank_{rank}.log"

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def call(self, name: str, *args: Any) -> list[Any]:
        """`worker.name(*args)` on every rank -> their results, by rank. Raises RankFailure, and UserError that a rank raised."""
        return self.each(name, [args] * len(self._connections))

    def each(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """See the protocol."""
        self._send(name, arguments)
        return self._collect(name)

    def stream(self, name: str, *args: Any) -> Iterator[Any]:
        """The items of a generator method of all ranks, as they arrive."""
        self._send(name, [args] * len(self._connections))
        yield from self._parts(name)

    def _send(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        if not self._connections:
            raise RankFailure("the trainer's ranks have been closed")
        messages = {key: wire.dumps((name, args)) for key, args in {id(args): args for args in arguments}.items()}
        for rank, (connection, args) in enumerate(zip(self._connections, arguments, strict=True)):
            try:
                connection.send_bytes(messages[id(args)])
            except OSError:
                self._lost(rank, name)

    def _collect(self, name: str) -> list[Any]:
        results: list[Any] = [None] * len(self._connections)
        for rank, answer in self._answers(name):
            results[rank] = answer
        return results

    def _answers(self, name: str) -> Iterator[tuple[int, Any]]:
        """One message of every rank, in the order of arrival."""
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        deadline = time.monotonic() + self.timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                self._silent(sorted(waiting.values()), name)
            for connection in ready:
                assert isinstance(connection, Connection)
                yield waiting.pop(connection), self._receive(connection, name)

    def _parts(self, name: str) -> Iterator[Any]:
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        while waiting:
            ready = wait(list(waiting), timeout=self.timeout)
            if not ready:
                self._silent(sorted(waiting.values()), name)
            for connection in ready:
                assert isinstance(connection, Connection)
                message = self._receive(connection, name)
                if message is None:
                    del waiting[connection]
                else:
                    yield from message

    def _receive(self, connection: Connection, name: str) -> Any:
        rank = self._connections.index(connection)
        try:
            message = wire.receive(connection)
        except (EOFError, OSError):
            self._lost(rank, name)
        if isinstance(message, wire.Failure):
            self._failed(rank, name, message)
        return message

    def _failed(self, rank: int, name: str, failure: wire.Failure) -> None:
        """A rank raised. Often another one died first and this one only noticed: then that one is named."""
        dead = self._dead_rank(besides=rank) if failure.traceback else None
        if dead is not None:
            self._lost(dead, name)
        self.close()
        if failure.traceback is None:
            kind = Failure if failure.broke else UserError
            raise kind(failure.problem, fix=failure.fix, key=failure.key)
        raise RankFailure(f"trainer rank {rank} failed in {name}: {failure.problem}\n{failure.traceback}")

    def _dead_rank(self, besides: int) -> int | None:
        deadline = time.monotonic() + 1.0  # a killed process takes a moment to be reaped
        while time.monotonic() < deadline:
            for rank, process in enumerate(self._processes):
                if rank != besides and process.poll() not in (None, 1):
                    return rank
            time.sleep(0.05)
        return None

    def _lost(self, rank: int, name: str) -> None:
        process = self._processes[rank]
        try:
            code = process.wait(timeout=5.0)
            how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        except subprocess.TimeoutExpired:
            how = "closed its connection"
        output = self._tail(rank)
        self.close()
        raise RankFailure(f"trainer rank {rank} {how} during {name}; all ranks were ended{output}")

    def _tail(self, rank: int) -> str:
        return indented(self.log(rank).read_text(errors="replace").splitlines()[-LOG_LINES:])

    def _silent(self, ranks: list[int], name: str) -> None:
        for rank in ranks:
            self._processes[rank].send_signal(signal.SIGUSR1)  # it writes its stack into its log
        time.sleep(STACK_SECONDS)
        log = self.log(ranks[0]).read_text(errors="replace")
        self.close()
        raise silence(ranks, name, self.timeout, log)

    def close(self) -> None:
        """End every rank; safe to call again."""
        for connection in self._connections:
            connection.close()
        self._connections = []
        for process in self._processes:
            if process.poll() is None:
                process.kill()  # a stopped or hung rank would not notice that its connection closed
            process.wait()
        self._processes = []
        scratch.remove(self._scratch)


def _fresh(environment: dict[str, str], connection: int, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "runner.trainer.megatron.process", str(connection)],
            env=environment,
            pass_fds=[connection],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C and a scheduler's SIGTERM reach the whole group
        )


def silence(ranks: list[int], name: str, seconds: float, log: str) -> RankFailure:
    """That these ranks did not answer a call. `log`: of the first, which ends with its stack."""
    shown = ", ".join(map(str, ranks))
    stack = log.rpartition("(most recent call first):")[2].splitlines()[1 : 1 + LOG_LINES]
    return RankFailure(
        f"trainer rank{'s' * (len(ranks) > 1)} {shown} gave no answer to {name} within {seconds:g} s; "
        f"all were ended. Rank {ranks[0]} was in:{indented(stack)}",
        key="trainer.rank_timeout_seconds",
    )


def indented(lines: list[str]) -> str:
    return "".join(f"\n    {line}" for line in lines)
