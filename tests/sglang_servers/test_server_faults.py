"""Servers that die, hang or cannot start; a driver that dies; and keys that must not be seen."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("aiohttp", reason="make setup-sglang")

from cases import Running, by_key, config, exported, reference_logprobs, requests

from runner.errors import UserError
from runner.rollout.sglang.plugin.shared import SHARED, shared_file, shared_segment
from runner.rollout.sglang.server import Server

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def two_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from runner.rollout.sglang import SglangPool

    cfg = config("sglang", "model=tiny_moe", "precision=bf16", "rollout.cpu_engines=2", "rollout.health_interval_seconds=1")
    run_dir = tmp_path_factory.mktemp("run")
    pool = SglangPool(cfg, run_dir)
    yield Running(pool, cfg)
    pool.close()


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def wait_for(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def settled(running: Any) -> Any:
    """The pool with both engines up and the same weights in each; counters at zero."""
    engines = running.pool._fleet.roster.engines
    wait_for(lambda: all(engine.up for engine in engines))
    running.fresh()
    assert all(engine.synced == running.pool._fleet.roster.updates for engine in engines)
    running.pool.metrics()
    return running.pool


def gone(processes: list[psutil.Process], seconds: float = 15.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


@pytest.mark.promise("load is balanced by outstanding tokens, a prompt's group stays together")
def test_both_engines_work_and_groups_stay_together(two_engines: Any) -> None:
    pool = settled(two_engines)
    list(pool.generate(requests(32, same_prompt=4)))
    homes = list(pool._fleet.dispatch._homes.values())
    assert {engine.server.index for engine in homes[-8:]} == {0, 1}


@pytest.mark.promise("a scheduler that fails takes the process along that owns it")
@pytest.mark.promise("requests of a dead engine are asked for again, none lost or doubled")
def test_killing_an_engine_in_the_middle_loses_and_doubles_nothing(two_engines: Any) -> None:
    """kill -9 of one of two: its requests are asked for again, it comes back, and has the current weights."""
    pool = settled(two_engines)
    other, items = exported(two_engines.cfg, seed=2)
    two_engines.sync(items, 1)
    wanted = requests(48, same_prompt=4, max_response_tokens=100)
    whole = by_key(list(pool.generate(wanted)))
    pool.metrics()
    run = pool.generate(wanted)
    samples = [next(run)]
    victim = pool._fleet.roster.engines[0]
    processes = family(victim.server.pid)
    os.kill(victim.server.pid, signal.SIGKILL)
    samples += list(run)
    found = by_key(samples)
    assert found.keys() == whole.keys()
    for key, sample in found.items():  # seeds are the requests' own, so the other engine gives the same tokens
        assert torch.equal(sample.tokens, whole[key].tokens)
        torch.testing.assert_close(sample.rollout_logprobs, reference_logprobs(other, sample), atol=1e-4, rtol=0)
    metrics = pool.metrics()
    assert metrics["rollout/engine_restarts"] == 1 and metrics["rollout/requests_retried"] >= 1
    assert ["SGLang server 0 is started again: " in notice for notice in pool.notices()] == [True]
    assert gone(processes), "the dead engine's scheduler outlived it"
    wait_for(lambda: victim.synced == pool._fleet.roster.updates)
    victim_only = [pool._loop.submit(_direct(victim, request)) for request in wanted[:3]]
    for request, answer in zip(wanted, victim_only, strict=False):
        key = (request.prompt_id, request.sample_index)
        assert answer.result(timeout=60) == whole[key].response_tokens.tolist()


async def _direct(engine: Any, request: Any) -> list[int]:
    from runner.rollout.sglang.decoding import Generation

    reply = await engine.client.generate(Generation(request, 256, None, f"direct-{request.seed}").payload(0))
    return list(reply["output_ids"])


@pytest.mark.promise("a hanging server is started again")
def test_a_hanging_engine_is_started_again(two_engines: Any) -> None:
    pool = settled(two_engines)
    victim = pool._fleet.roster.engines[1]
    for process in family(victim.server.pid)[1:]:
        process.send_signal(signal.SIGSTOP)  # the HTTP server still answers, the scheduler does not
    samples = by_key(list(pool.generate(requests(16, max_response_tokens=40))))
    assert len(samples) == 16
    assert pool.metrics()["rollout/engine_restarts"] == 1


@pytest.mark.promise("requests of a dead engine are asked for again, none lost or doubled")
def test_an_update_while_an_engine_is_down_reaches_it_later(two_engines: Any) -> None:
    pool = settled(two_engines)
    victim = pool._fleet.roster.engines[0]
    os.kill(victim.server.pid, signal.SIGKILL)
    other, items = exported(two_engines.cfg, seed=3)
    two_engines.sync(items, 7)
    wait_for(lambda: victim.synced == pool._fleet.roster.updates)
    request = requests(1, temperature=0.0)[0]
    tokens = pool._loop.submit(_direct(victim, request)).result(timeout=60)
    (expected,) = pool.generate([request])
    assert tokens == expected.response_tokens.tolist() and expected.weight_spans[0].version == 7
    torch.testing.assert_close(expected.rollout_logprobs, reference_logprobs(other, expected), atol=1e-4, rtol=0)


@pytest.mark.promise("torch's rendezvous and gloo listen on every interface")
def test_nobody_gets_in_without_the_key_and_the_key_is_nowhere_to_be_read(two_engines: Any) -> None:
    pool = settled(two_engines)
    server = pool._fleet.roster.engines[1].server
    key = pool._fleet.lifecycle._api_key
    for path, body in (
        ("/generate", {"input_ids": [5]}),
        ("/update_weights_from_ipc", {"zmq_handles": {}}),
        ("/server_info", None),
    ):
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(server.url + path, data=data, headers={"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.code == 401
    for process in family(server.pid):
        assert key not in " ".join(process.cmdline()) and key not in " ".join(process.environ().values())
    logs = list(pool._run_dir.glob("logs/sglang_*.log"))
    assert len(logs) == 2 and all(key not in log.read_text() for log in logs)
    listening = {
        address.laddr.ip for p in family(server.pid) for address in p.net_connections("inet") if address.status == "LISTEN"
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.promise("files of killed servers stay in shared memory")
@pytest.mark.promise("no orphans after the driver is killed")
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.night), 2])
def test_a_driver_that_is_killed_takes_its_servers_along(tmp_path: Path, ranks: int) -> None:
    """Processes, and what they have in shared memory."""
    code = f"""
import sys
from cases import config
from runner.rollout.sglang import SglangPool
pool = SglangPool(config("sglang", "model=tiny_dense", "precision=bf16", "router_replay=none", "rollout.cpu_tp={ranks}"))
print(pool._fleet.roster.engines[0].server.pid, flush=True)
sys.stdin.read()
"""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    driver = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert driver.stdout is not None
    server = int(driver.stdout.readline())
    processes = family(server)
    names = (shared_file(server, "*").name, shared_segment("*", server, "*"))

    def shared() -> list[Path]:
        return [path for name in names for path in SHARED.glob(name)]

    assert len(processes) >= 2 + ranks  # server, schedulers, detokenizer
    assert len(shared()) >= ranks
    driver.kill()
    driver.wait()
    assert gone(processes), [process for process in processes if process.is_running()]
    assert shared() == []


def _failing(tmp_path: Path, **arguments: Any) -> str:
    """The message of a pool whose servers get these arguments on top."""
    from runner.rollout.sglang import SglangPool

    class Broken(SglangPool):
        def _servers(self, api_key: str) -> list[Server]:
            servers = super()._servers(api_key)
            for server in servers:
                server.arguments |= arguments
                server.log = tmp_path / server.log.name
            return servers

    with pytest.raises(UserError) as caught:
        Broken(config("sglang", "model=tiny_dense", "precision=bf16", "router_replay=none"))
    return str(caught.value)


@pytest.mark.promise("out of memory and a wrong checkpoint are one message")
@pytest.mark.night
def test_a_wrong_checkpoint_is_one_message_with_the_log(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"], "model_type": "qwen3"}))
    message = _failing(tmp_path, model_path=str(tmp_path))
    assert "SGLang server 0 did not start" in message and "NoSuchModel" in message and "sglang_0.log" in message


@pytest.mark.promise("a port in use is replaced")
@pytest.mark.night
def test_a_port_that_another_program_took_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.rollout.sglang import SglangPool, server

    real, given = server.free_ports, []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        def ports(host: str, count: int) -> list[int]:
            found = real(host, count)
            if not given:
                found[0] = taken.getsockname()[1]
            given.append(found)
            return found

        monkeypatch.setattr(server, "free_ports", ports)
        pool = SglangPool(config("sglang", "model=tiny_dense", "precision=bf16", "router_replay=none"))
        try:
            assert len(given) == 2 and pool._fleet.roster.engines[0].server.port == given[1][0]
        finally:
            pool.close()
