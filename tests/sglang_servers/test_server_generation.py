"""Generation features that need a real server: streaming, timeouts, what travels in an update, starts that fail, a quiet end."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("aiohttp", reason="make setup-sglang")

from cases import by_key, reference_logprobs, requests
from test_server_faults import _failing

from runner.data import Status

pytestmark = pytest.mark.sglang


@pytest.mark.promise("samples reach the loop as they finish")
def test_samples_come_as_they_finish(sglang_fp32: Any) -> None:
    """Short ones while long ones of the same call still run."""
    pool = sglang_fp32.pool
    sglang_fp32.fresh()
    long = named(requests(3, max_response_tokens=230))
    short = requests(3, max_response_tokens=3)
    run = pool.generate([*long, *short])
    first = [next(run) for _ in short]
    assert {sample.prompt_id for sample in first} == {request.prompt_id for request in short}
    assert sum(engine.outstanding for engine in pool._fleet.roster.engines) >= 3 * 230
    assert {sample.response_length for sample in run} == {230}


@pytest.mark.promise("timeouts")
def test_a_request_that_takes_too_long_is_tried_again_and_then_failed(sglang_fp32: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends what nobody waits for, and serves the next request."""
    pool = sglang_fp32.pool
    sglang_fp32.fresh()
    pool.metrics()
    (request,) = requests(1, max_response_tokens=240)
    monkeypatch.setattr(pool._fleet.roster.engines[0].client, "_timeout", 0.05)
    (sample,) = pool.generate([request])
    assert sample.status is Status.failed and "did not answer" in sample.finish_reason
    assert pool.metrics()["rollout/requests_retried"] == pool._fleet.roster.settings.max_retries + 1
    monkeypatch.undo()
    (again,) = pool.generate([request])
    assert again.response_length == 240


@pytest.mark.promise("tensor updates over HTTP kill the server unless the sender shares through the file system")
@pytest.mark.promise("without a flush, answers mix old and new weights")
def test_an_update_never_sends_pickles_and_flushes(sglang_fp32: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's tensor endpoint unpickles, and dies of shared tensors; ours reads files and broadcasts."""
    from runner.rollout.sglang.client import Client

    pool = sglang_fp32.pool
    asked: list[tuple[str, Any]] = []
    real = Client._call

    async def call(self: Any, path: str, body: Any, **options: Any) -> Any:
        asked.append((path, body))
        return await real(self, path, body, **options)

    monkeypatch.setattr(Client, "_call", call)
    for transport in ("tensor", "distributed"):
        with pool.driver.over(transport):
            sglang_fp32.fresh()
    assert {path for path, _ in asked} == {
        "/pause_generation", "/begin_weight_update", "/update_weights_from_ipc", "/end_weight_update", "/continue_generation",
    }  # fmt: skip
    commits = [body for path, body in asked if path == "/update_weights_from_ipc" and "commit" in body["zmq_handles"]["runner"]]
    assert len(commits) == 2 and all(body["flush_cache"] for body in commits)


@pytest.mark.promise("out of memory and a wrong checkpoint are one message")
def test_an_engine_that_runs_out_of_memory_is_one_message_and_leaves_no_process(tmp_path: Path) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    message = _failing(tmp_path, mem_fraction_static=1e-6, max_total_tokens=None)
    assert "it ran out of memory" in message and "rollout.max_concurrency" in message and "sglang_0.log" in message
    after = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    assert [process for process in after if process.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.promise("engines sleep while the trainer has their GPUs")
def test_engines_that_slept_compute_as_before(sglang_int4: Any) -> None:
    """Their memory comes back empty (the CPU twin overwrites it): waking brings the weights, and so does an update."""
    pool, built = sglang_int4.pool, sglang_int4.fresh()
    for wake in (pool.wake, lambda: sglang_int4.sync(sglang_int4.items, 1)):
        pool.sleep()
        pool.sleep()  # nothing to do
        wake()
        pool.wake()
        samples = list(pool.generate(requests(4)))
        assert len(samples) == 4
        for sample in samples:
            torch.testing.assert_close(sample.rollout_logprobs, reference_logprobs(built, sample), atol=1e-4, rtol=0)
    assert pool._fleet.roster.counters["restarts"] == 0


@pytest.mark.promise("engines sleep while the trainer has their GPUs")
def test_what_runs_is_aborted_before_engines_sleep_and_goes_on_when_they_wake(sglang_fp32: Any) -> None:
    pool, built = sglang_fp32.pool, sglang_fp32.fresh()
    pool.metrics()
    short, long = requests(1, max_response_tokens=4, routes=False), requests(3, max_response_tokens=200, routes=False)
    run = pool.generate([*short, *named(long)])
    first = next(run)
    pool.sleep()
    pool.wake()
    samples = [first, *run]
    assert len(by_key(samples)) == 4 and pool.metrics()["rollout/requests_continued"] == 3
    for sample in samples:
        torch.testing.assert_close(sample.rollout_logprobs, reference_logprobs(built, sample), atol=1e-4, rtol=0)


def named(asked: list[Any]) -> list[Any]:
    """Other names than those of the same prompts in another list."""
    return [dataclasses.replace(request, prompt_id=f"long{index}") for index, request in enumerate(asked)]


@pytest.mark.promise("shutdown prints KeyErrors of the resource tracker")
def test_a_run_ends_without_a_word(tmp_path: Path) -> None:
    """What SGLang prints while it ends (resource_tracker's KeyErrors) stays in its log, and shared memory is given back."""
    code = """
from cases import config, exported, requests
from runner.rollout.sglang import SglangPool
cfg = config("sglang", "model=tiny_dense", "precision=bf16", "router_replay=none")
pool = SglangPool(cfg)
assert pool.update_weights(0, iter(exported(cfg)[1])).problems == []
assert len(list(pool.generate(requests(2, routes=False)))) == 2
print(pool.driver.writer.root)
pool.close()
"""
    here = Path(__file__).parent
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=240)
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    assert not Path(ended.stdout.strip()).exists() and time.monotonic() - began < 240
