"""The process that CPU ranks are forked from: it only imports, what it forks is like a fresh process, all die with the driver."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from runner.trainer.megatron import forkserver
from tests.megatron_trainer.configs import megatron_config
from tests.megatron_trainer.scenario import megatron
from tests.trainer_configs import batch

pytestmark = pytest.mark.megatron


@pytest.fixture
def forked(tmp_path: Path):
    """A rank that has not been told what to be, and the driver's end of its socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        rank = forkserver.fork(os.environ | {"RUNNER_TEST": "here"}, theirs.fileno(), tmp_path / "log")
    connection = Connection(ours.detach())
    while os.getsid(rank.pid) != rank.pid:  # it closes what it does not need before that
        time.sleep(0.01)
    yield rank, connection
    connection.close()
    rank.kill()
    rank.wait(10.0)


def test_the_server_has_one_thread_and_its_ranks_a_session_of_their_own(forked: tuple[forkserver.Forked, Connection]) -> None:
    rank, _ = forked
    server = psutil.Process(psutil.Process(rank.pid).ppid())
    assert server.num_threads() == 1 and server.ppid() == os.getpid()
    assert os.getsid(rank.pid) == rank.pid
    assert not [fd for fd in Path(f"/proc/{rank.pid}/fd").iterdir() if str(fd.readlink()).startswith("pipe:")]


def test_a_rank_ends_when_its_connection_closes(forked: tuple[forkserver.Forked, Connection]) -> None:
    rank, connection = forked
    assert rank.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        rank.wait(0.01)
    connection.close()
    assert rank.wait(20.0) == 0 and rank.poll() == 0 and not psutil.pid_exists(rank.pid)


def test_exit_codes_are_the_ranks_own(forked: tuple[forkserver.Forked, Connection]) -> None:
    rank, _ = forked
    rank.send_signal(signal.SIGTERM)  # the driver's to handle
    rank.kill()
    assert rank.wait(20.0) == -signal.SIGKILL
    rank.kill()  # safe


def test_ranks_die_with_the_server_and_the_next_call_starts_another(tmp_path: Path) -> None:
    cfg = megatron_config("moe", "single", format="int4")
    with megatron(cfg) as trainer:
        (pid,) = trainer.ranks.pids
        server = psutil.Process(pid).ppid()
        os.kill(server, signal.SIGKILL)
        assert trainer.ranks._processes[0].wait(20.0) == -signal.SIGKILL
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=20.0)
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    with megatron(cfg) as again:
        assert psutil.Process(again.ranks.pids[0]).ppid() != server
        again.step(batch(cfg))


def test_a_rank_whose_end_is_not_told_yet_gets_nothing() -> None:
    """Its server has waited for it, so that its id is free, and has not written the exit code."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    reads, writes = os.pipe()
    rank = forkserver.Forked(ended.pid, reads)
    rank.kill()
    os.write(writes, (3).to_bytes(4, "little"))
    os.close(writes)
    assert rank.wait(1.0) == 3
