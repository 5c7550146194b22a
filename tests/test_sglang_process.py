"""Messages about a child process that ended: from its latest start only. Needs no SGLang."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runner.cluster.launcher import EngineOrder
from runner.config import compose
from runner.precision import cpu_matmul
from runner.rollout.sglang.process import Child, last_error, start_problem

OLD = "RuntimeError: address already in use\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ValueError: no such model\n", "ValueError: no such model"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate\n", "it ran out of memory"),
        ("ValueError: Loaded weights leave no GPU memory for the KV cache under --mem-fraction\n", "it ran out of memory"),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\n", "it ran out of memory"),
        ("ERROR: [Errno 98] error while attempting to bind: address already in use\n", "another program took its port"),
        ("INFO: nothing wrong\n", ""),
    ],
)
def test_the_last_error_of_this_start_is_named(tmp_path: Path, line: str, message: str) -> None:
    log = tmp_path / "log"
    log.write_text(OLD + line)
    assert last_error(log, len(OLD)) == message
    assert last_error(tmp_path / "nothing", 0) == ""


FREEZE = """WARNING: post-warmup freeze_gc failed
Traceback (most recent call last):
  File "connection.py", line 1, in connect
ConnectionRefusedError: [Errno 111] Connection refused

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "adapters.py", line 2, in send
requests.exceptions.ConnectionError: HTTPConnectionPool(port=1): Max retries exceeded with url: /freeze_gc (Caused by x)
"""
REAL = "Traceback (most recent call last):\n  File 'a.py', line 1, in b\nValueError: no such model\n"


def test_a_traceback_that_every_server_writes_is_no_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for content, message in (
        (FREEZE, ""),
        (REAL + FREEZE, "ValueError: no such model"),
        (FREEZE + REAL, "ValueError: no such model"),
    ):
        log.write_text(content)
        assert last_error(log, 0) == message


class Ended(Child):
    title, module = "a server", "runner.no_such_module"

    def start(self) -> None:
        self.launch({})


def test_a_process_that_ends_at_once_says_why_and_can_be_started_again(tmp_path: Path) -> None:
    child = Ended(host="127.0.0.1", api_key="secret", log=tmp_path / "logs" / "child.log")
    child.log.parent.mkdir()
    child.log.write_text(OLD)
    for _ in range(2):
        child.start()
        assert child._process is not None
        child._process.wait(60)
        problem = start_problem(child, 5)
        assert "a server did not start: " in str(problem) and "no_such_module" in child.log.read_text()
        assert "took its port" not in str(problem) and "secret" not in child.log.read_text()
        child.kill()
        assert not child.alive()


@pytest.mark.parametrize("way", ["native", "widened"])
def test_a_server_multiplies_bf16_as_its_driver_does(tmp_path: Path, way: str) -> None:
    """The plugin's first call in a process that has the environment of a CPU server."""
    pytest.importorskip("aiohttp", reason="make setup-sglang")
    from runner.rollout.sglang.server import Site

    words = ["model=tiny_moe", "rollout=sglang", "speculative=none", "precision=bf16", f"precision.cpu_matmul={way}"]
    cfg = compose.load_config(words)
    order = EngineOrder(0, {"device": "cpu", "tp_size": 1}, "secret", tmp_path / "log")
    server = Site.here(cfg, tmp_path, ranks=1).server(order, device=0)
    code = (
        "from runner.config.schema import CpuMatmul; from runner.precision import cpu_matmul as m\n"
        "print(m.install(CpuMatmul.auto)[0].name, m.widened())"
    )
    shown = subprocess.run([sys.executable, "-c", code], env=server.environment(), capture_output=True, text=True, timeout=120)
    assert server.environment()[cpu_matmul.VARIABLE] == way
    assert shown.stdout.split() == [way, str(way == "widened")], shown.stderr
