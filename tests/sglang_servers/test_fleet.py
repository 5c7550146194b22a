"""How the pool chooses engines, retries and continues, against engines that only pretend. Starts no server."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("aiohttp", reason="make setup-sglang")

import aiohttp
from aiohttp import web
from fleets import FakeClient, chosen, generation, ready_fleet, reply

from runner.data import Status
from runner.rollout.sglang import dispatch
from runner.rollout.sglang.client import Client, EngineFailure, Refused


@pytest.mark.promise("load is balanced by outstanding tokens, a prompt's group stays together")
def test_load_is_balanced_by_outstanding_tokens_not_by_requests() -> None:
    async def run() -> list[int]:
        fleet = ready_fleet(FakeClient(), FakeClient())
        lengths = [100, 10, 10, 10, 10]
        return [await chosen(fleet, generation(f"p{i}", prompt_tokens=length)) for i, length in enumerate(lengths)]

    assert asyncio.run(run()) == [0, 1, 1, 1, 1]  # one long prompt weighs as much as many short ones


@pytest.mark.promise("load is balanced by outstanding tokens, a prompt's group stays together")
def test_a_prompts_group_stays_together_until_its_engine_is_far_busier() -> None:
    async def run() -> list[int]:
        fleet = ready_fleet(FakeClient(), FakeClient())
        return [await chosen(fleet, generation("same")) for _ in range(dispatch.AFFINITY_REQUESTS + 4)]

    places = asyncio.run(run())
    assert places[: dispatch.AFFINITY_REQUESTS + 1] == [0] * (dispatch.AFFINITY_REQUESTS + 1) and 1 in places


def test_only_engines_with_the_current_weights_are_chosen() -> None:
    async def run() -> list[int]:
        fleet = ready_fleet(FakeClient(), FakeClient())
        fleet.roster.engines[0].synced = 0
        return [await chosen(fleet, generation(f"p{i}")) for i in range(3)]

    assert asyncio.run(run()) == [1, 1, 1]


@pytest.mark.promise("retries with backoff, then a failed sample with its reason")
def test_a_failed_request_is_tried_again_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await real(0)

    monkeypatch.setattr(dispatch.asyncio, "sleep", sleep)
    client = FakeClient(EngineFailure("gone"), EngineFailure("gone"), reply([7, 8, 9, 4]))
    fleet = ready_fleet(client)
    sample = asyncio.run(fleet.complete(generation()))
    assert sample.response_tokens.tolist() == [7, 8, 9, 4] and sample.status is Status.truncated
    assert len({body["rid"] for body in client.bodies}) == 3  # a server may still know the earlier ones
    assert slept == [dispatch.BACKOFF_SECONDS, 2 * dispatch.BACKOFF_SECONDS] and fleet.roster.counters["failures"] == 2
    assert fleet.roster.engines[0].outstanding == 0


@pytest.mark.promise("retries with backoff, then a failed sample with its reason")
def test_a_request_that_fails_too_often_is_a_failed_sample_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKOFF_SECONDS", 0.001)
    sample = asyncio.run(ready_fleet(FakeClient(EngineFailure("no answer within 5 s"))).complete(generation()))
    assert sample.status is Status.failed and "no answer within 5 s" in sample.finish_reason and sample.response_length == 0


@pytest.mark.promise("logprobs that are no numbers are a failure")
def test_a_logprob_that_is_no_number_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang answers null for NaN and goes on generating."""
    monkeypatch.setattr(dispatch, "BACKOFF_SECONDS", 0.001)
    for value in (None, float("nan"), float("-inf")):
        wrong = reply([7, 8])
        wrong["meta_info"]["output_token_logprobs"][1] = (value, 8, None)
        sample = asyncio.run(ready_fleet(FakeClient(wrong)).complete(generation()))
        assert sample.status is Status.failed and "a logprob is not a number" in sample.finish_reason
        scored = {"meta_info": {"input_token_logprobs": [(None, 5, None), (value, 6, None)]}}
        with pytest.raises(EngineFailure, match="a scored sequence: a logprob is not a number"):
            asyncio.run(ready_fleet(FakeClient(scored)).score([5, 6]))


@pytest.mark.promise("partial rollouts: kept prefix, spans per token and per row of routes")
def test_an_aborted_request_goes_on_from_what_it_kept() -> None:
    client = FakeClient(reply([7, 8], "abort", "3.1"), reply([9, 4], "length", "4.2"))
    sample = asyncio.run(ready_fleet(client).complete(generation(room=4)))
    first, second = client.bodies
    assert second["input_ids"] == [*first["input_ids"], 7, 8] and second["sampling_params"]["max_new_tokens"] == 2
    assert second["sampling_params"]["sampling_seed"] == first["sampling_params"]["sampling_seed"]
    assert sample.response_tokens.tolist() == [7, 8, 9, 4]
    assert [(span.version, span.start, span.stop) for span in sample.weight_spans] == [(3, 0, 2), (4, 2, 4)]


@pytest.mark.promise("retries with backoff, then a failed sample with its reason")
@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("/slow", EngineFailure, "did not answer within 0"),
        ("/broken", EngineFailure, "answered 500"),
        ("/refused", Refused, "answered 400: because"),
        ("/closed", EngineFailure, "Server"),
    ],
)
def test_what_a_server_may_answer(path: str, error: type[Exception], message: str) -> None:
    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(5)
        return web.Response()

    async def broken(_: web.Request) -> web.Response:
        return web.Response(status=500, text="oh")

    async def refused(_: web.Request) -> web.Response:
        return web.Response(status=400, text="because")

    async def closed(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async def run() -> None:
        app = web.Application()
        app.add_routes([web.post(f"/{f.__name__}", f) for f in (slow, broken, refused, closed)])
        started = web.AppRunner(app)
        await started.setup()
        site = web.TCPSite(started, "127.0.0.1", 0)
        await site.start()
        port = started.addresses[0][1]
        try:
            async with aiohttp.ClientSession() as session:
                await Client(session, f"http://127.0.0.1:{port}", "key", 0.3).post(path, {})
        finally:
            await started.cleanup()

    with pytest.raises(error, match=message):
        asyncio.run(run())
