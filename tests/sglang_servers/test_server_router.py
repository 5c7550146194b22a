"""Two engines behind the real sglang-router, all on this machine's own network address where it has one.

One pair of servers shows both: generation through the router, and that nothing listens anywhere but on cluster.interface.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
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
from cases import Running, by_key, config, exported, reference_logprobs, requests

from runner.rollout.sglang.interface import LOOPBACK, interfaces

pytestmark = [pytest.mark.sglang, pytest.mark.night]
pytest.importorskip("sglang_router", reason="sglang-router is not installed: make setup-sglang")
OUTSIDE = next(
    ((name, ips[0]) for name, ips in interfaces().items() if not ips[0].startswith("127.")), ("lo", LOOPBACK)
)  # a machine without a network tests the rest on loopback


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from runner.rollout.sglang import SglangPool

    cfg = config(
        "sglang", "model=tiny_moe", "precision=bf16", "router_replay=none", "rollout.cpu_engines=2", "rollout.use_router=true",
        f"cluster.interface={OUTSIDE[0]}", "rollout.weight_transport=distributed",
    )  # fmt: skip
    cfg.router_replay.rollout = True  # refused with a router: the engines record, so that a test sees the router drop routes
    run_dir = tmp_path_factory.mktemp("run")
    pool = SglangPool(cfg, run_dir)
    yield Running(pool, cfg)
    pool.close()


def asked_for(count: int, **sampling: Any) -> list[Any]:
    return requests(count, same_prompt=4, routes=False, **sampling)


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def sends_to(pool: Any) -> set[str]:
    """The router's own list of workers."""
    return set(pool._loop.run(pool._fleet.roster.router._workers()))


def served(pool: Any) -> list[int]:
    """Prompts that each engine has worked on, from its log."""
    return [server.log.read_text().count("Prefill batch") for server in (engine.server for engine in pool._fleet.roster.engines)]


@pytest.mark.promise("transports")
def test_samples_through_the_router_are_those_of_the_engines(routed: Any) -> None:
    """Seeds, logprobs, stop reasons and weight versions pass; both engines work; the update came as a broadcast."""
    pool = routed.pool
    built = routed.fresh(version=3)
    before = served(pool)
    wanted = asked_for(32, temperature=0.7, stop_token_ids=(9, 40, 41))
    through = by_key(list(pool.generate(wanted)))
    assert len(through) == 32
    assert all(after > start for start, after in zip(before, served(pool), strict=True)), "an engine did nothing"
    for sample in through.values():
        torch.testing.assert_close(sample.rollout_logprobs, reference_logprobs(built, sample, 0.7), atol=1e-4, rtol=0)
        assert [span.version for span in sample.weight_spans] == [3]
    router, pool._fleet.roster.router = pool._fleet.roster.router, None
    try:
        direct = by_key(list(pool.generate(wanted)))
    finally:
        pool._fleet.roster.router = router
    for key, sample in through.items():
        assert torch.equal(sample.tokens, direct[key].tokens) and sample.finish_reason == direct[key].finish_reason


def test_an_update_in_the_middle_of_a_run_goes_to_the_engines(routed: Any) -> None:
    """Partial samples come back through the router and are continued under the new weights."""
    pool = routed.pool
    built = routed.fresh()
    other, items = exported(routed.cfg, seed=2)
    short, long = asked_for(1, max_response_tokens=4), asked_for(8, max_response_tokens=200)
    run = pool.generate([*short, *[dataclasses.replace(r, prompt_id=f"long{i}") for i, r in enumerate(long)]])
    next(run)
    routed.sync(items, 1)
    samples = list(run)
    assert len(by_key(samples)) == 8 and sends_to(pool) == {engine.server.url for engine in pool._fleet.roster.engines}
    assert any(len(sample.weight_spans) == 2 for sample in samples)
    for sample in samples:
        *_, new = sample.weight_spans
        assert [span.version for span in sample.weight_spans] in ([0, 1], [1]) and new.stop == 200  # [1]: it still waited
        before = reference_logprobs(built, sample)[: new.start]
        torch.testing.assert_close(sample.rollout_logprobs[: new.start], before, atol=1e-4, rtol=0)
        after = reference_logprobs(other, sample)[new.start :]
        torch.testing.assert_close(sample.rollout_logprobs[new.start :], after, atol=1e-4, rtol=0)


@pytest.mark.promise("concurrency is bounded, requests are pulled as room appears, a run can be abandoned")
def test_abandoned_requests_end_in_the_engines(routed: Any) -> None:
    pool = routed.pool
    routed.fresh()
    run = pool.generate([*asked_for(1, max_response_tokens=2), *asked_for(16, max_response_tokens=240)[1:]])
    next(run)
    run.close()
    wait_for(lambda: pool._fleet.roster.router.outstanding == 0, 20)
    began = time.monotonic()
    assert len(list(pool.generate(asked_for(4, max_response_tokens=2)))) == 4
    assert time.monotonic() - began < 5


@pytest.mark.promise("the router drops routes and knows no pause")
def test_the_router_passes_on_neither_routes_nor_pauses(routed: Any) -> None:
    """Why router replay refuses it, and why pauses and updates go to the engines."""
    from runner.rollout.sglang.client import Refused

    pool = routed.pool
    routed.fresh()
    body = asked_for(1, temperature=0.0)[0]
    payload = {"input_ids": list(body.tokens), "sampling_params": {"max_new_tokens": 4}, "return_routed_experts": True}
    direct = pool._loop.run(pool._fleet.roster.engines[0].client.generate(payload))
    through = pool._loop.run(pool._fleet.roster.router.client.generate(payload))
    assert "routed_experts" in direct["meta_info"] and not through["meta_info"].get("routed_experts")
    for path in ("/pause_generation", "/begin_weight_update", "/update_weights_from_ipc"):
        with pytest.raises(Refused, match="answered 404"):
            pool._loop.run(pool._fleet.roster.router.client.post(path, {}))


@pytest.mark.promise("a scheduler that fails takes the process along that owns it")
def test_a_dead_engine_leaves_the_router_and_comes_back_with_weights(routed: Any) -> None:
    """Here its scheduler dies, which takes the server along and nothing else."""
    pool = routed.pool
    routed.fresh(version=5)
    victim = pool._fleet.roster.engines[0]
    old = victim.server.url
    wanted = asked_for(32, max_response_tokens=120)
    whole = by_key(list(pool.generate(wanted)))
    pool.metrics()
    run = pool.generate(wanted)
    samples = [next(run)]
    (scheduler,) = [p for p in family(victim.server.pid) if "scheduler" in p.name() or "scheduler" in " ".join(p.cmdline())]
    scheduler.kill()
    samples += list(run)
    found = by_key(samples)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key].tokens, whole[key].tokens) for key in whole)
    wait_for(lambda: victim.server.url != old and victim.synced == pool._fleet.roster.updates)
    wait_for(lambda: sends_to(pool) == {engine.server.url for engine in pool._fleet.roster.engines})
    assert pool.metrics()["rollout/engine_restarts"] == 1


def test_a_dead_router_is_started_again(routed: Any) -> None:
    pool = routed.pool
    wait_for(lambda: all(engine.up for engine in pool._fleet.roster.engines))
    routed.fresh()
    os.kill(pool._fleet.roster.router.process.pid, signal.SIGKILL)
    assert len(by_key(list(pool.generate(asked_for(12))))) == 12
    wait_for(lambda: pool._fleet.roster.router.up)
    assert sends_to(pool) == {engine.server.url for engine in pool._fleet.roster.engines}


@pytest.mark.promise("torch's rendezvous and gloo listen on every interface")
def test_nothing_listens_elsewhere_and_nobody_gets_in_without_the_key(routed: Any) -> None:
    """The router's metrics have no key: they stay on loopback."""
    pool = routed.pool
    routed.fresh()
    router = pool._fleet.roster.router
    for process in (router.process, *(engine.server for engine in pool._fleet.roster.engines)):
        assert process.url.startswith(f"http://{OUTSIDE[1]}:")
        data = json.dumps({"input_ids": [5]}).encode()
        request = urllib.request.Request(f"{process.url}/generate", data=data, headers={"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10)
        assert caught.value.code == 401
        members = family(process.pid)
        addresses = {c.laddr for p in members for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert {address.ip for address in addresses} <= {OUTSIDE[1], LOOPBACK}
        key = pool._fleet.lifecycle._api_key
        assert all(key not in " ".join([*p.cmdline(), *p.environ().values()]) for p in members)
        assert key not in process.log.read_text()
    logs = sorted(path.name for path in pool._run_dir.glob("logs/sglang_*.log"))
    assert logs == ["sglang_0.log", "sglang_1.log", "sglang_router.log"]


@pytest.mark.promise("no orphans after the driver is killed")
def test_a_driver_that_is_killed_takes_its_router_along(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from pathlib import Path
import aiohttp
from runner.rollout.sglang.router import Router, RouterProcess, router_arguments
async def main():
    process = RouterProcess(router_arguments(60), host="127.0.0.1", api_key="key", log=Path(sys.argv[1]) / "log")
    async with aiohttp.ClientSession() as session:
        await Router(process, "key", 60).start(session)
    print(process.pid, flush=True)
asyncio.run(main())
sys.stdin.read()
"""
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert driver.stdout is not None
    processes = family(int(driver.stdout.readline()))
    assert len(processes) == 2  # the router and its guard
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_closing_leaves_no_process(routed: Any) -> None:
    """Last in this file: it closes the pool."""
    roster = routed.pool._fleet.roster
    processes = [p for child in (roster.router.process, *(e.server for e in roster.engines)) for p in family(child.pid)]
    routed.pool.close()
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
