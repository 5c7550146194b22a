"""How the pool chooses engines, retries, continues and orders an update, against engines that only pretend. Starts no server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from cases import requests

pytest.importorskip("aiohttp", reason="make setup-sglang")

import aiohttp
from aiohttp import web

from runner.config.choices import PauseMode, TransferProtocol
from runner.data import Status
from runner.errors import UserError
from runner.rollout.sglang import SglangPool, dispatch, lifecycle
from runner.rollout.sglang.client import Client, EngineFailure, Refused
from runner.rollout.sglang.decoding import Generation
from runner.rollout.sglang.engines import Settings, version_of_label
from runner.rollout.sglang.fleet import Fleet
from runner.run.loop import tell_notices
from runner.tracking.tracker import JsonlTracker
from runner.weights.transports import Driver, Site, broadcast
from runner.weights.transports.files import FilesDriver
from runner.weights.weight_set import WeightSet

SETTINGS = Settings(
    startup_seconds=1, request_seconds=1, health_seconds=0, max_retries=2, pause_mode=PauseMode.abort, repacks=False,
    draft=frozenset(),
)  # fmt: skip
FILES = FilesDriver("tensor", None)  # type: ignore[arg-type]  # nothing is written here


class FakeServer:
    """Lives until `dead`."""

    def __init__(self, index: int) -> None:
        self.index, self.url, self.dead, self.log = index, f"engine {index}", False, Path("log")
        self.arguments = {"tp_size": 1}

    def client(self, session: aiohttp.ClientSession, api_key: str, *seconds: float) -> Client:
        return Client(session, self.url, api_key, *seconds)

    def alive(self) -> bool:
        return not self.dead

    def kill(self) -> None:
        """A process that is started again is another one."""


class FakeClient:
    """Records what it is asked. `answers` are given in turn to generate; an exception is raised, the last one stays."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.bodies, self.calls = list(answers), list[Any](), list[Any]()

    async def generate(self, body: dict[str, Any]) -> Any:
        self.bodies.append(body)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def plugin(self, action: str, **request: Any) -> dict[str, Any]:
        self.calls.append((action, request))
        return {"problems": [], "arrived": len(request.get("digests", [])), "checked": len(request.get("parts", []))}

    def __getattr__(self, name: str) -> Callable[..., Awaitable[None]]:
        async def record(*given: Any) -> None:
            self.calls.append((name, *given))

        return record


def reply(tokens: list[int], reason: str = "length", version: str = "3.1") -> dict[str, Any]:
    meta = {
        "finish_reason": {"type": reason},
        "output_token_logprobs": [(-0.5, token, None) for token in tokens],
        "weight_version": version,
    }
    return {"output_ids": tokens, "meta_info": meta}


def ready_fleet(*clients: FakeClient, driver: Driver = FILES, **settings: Any) -> Fleet:
    servers: Any = [FakeServer(i) for i in range(len(clients))]
    found = Fleet(servers, "key", dataclasses.replace(SETTINGS, **settings), driver)
    found.roster.updates = 1
    for engine, client in zip(found.roster.engines, clients, strict=True):
        engine.client, engine.up, engine.synced = client, True, 1  # type: ignore[assignment]
    return found


def generation(prompt: str = "p", prompt_tokens: int = 8, room: int = 4) -> Generation:
    request = dataclasses.replace(requests(1, max_response_tokens=room)[0], prompt_id=prompt, tokens=(5,) * prompt_tokens)
    return Generation(request, 256, None, prompt)


async def chosen(fleet: Fleet, what: Generation) -> int:
    """The engine that gets it; its tokens then are outstanding there."""
    engine = await fleet.dispatch._pick(what)
    engine.outstanding += what.outstanding
    return fleet.roster.engines.index(engine)  # type: ignore[arg-type]


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


@pytest.mark.promise("tensor and distributed updates are refused outside of a session")
@pytest.mark.parametrize(("mode", "flush"), [("abort", True), ("retract", True), ("in_place", False)])
def test_an_update_is_a_session_between_pause_and_resume_and_flushes(tmp_path: Path, mode: str, flush: bool) -> None:
    client = FakeClient()
    weights = WeightSet(4, tmp_path, digests={"a": "x"}, parts={"a": ["a"]}, formats={"a": "bf16"})
    fleet = ready_fleet(client, pause_mode=PauseMode(mode))
    asyncio.run(fleet.update(weights, ["a"], lambda: 0.0))
    assert [call[0] for call in client.calls] == [
        "pause", "begin_update", "load", "end_update", "check", "commit", "resume",
    ]  # fmt: skip
    assert client.calls[0] == ("pause", mode) and client.calls[5][1] == {"flush": flush, "version": "4.2"}
    assert fleet.roster.engines[0].synced == fleet.roster.updates == 2


@pytest.mark.promise("engines sleep while the trainer has their GPUs")
def test_engines_give_their_memory_back_and_take_it_around_a_load(tmp_path: Path) -> None:
    """A server that is not idle would end itself; the caches come back before the flush that commits."""
    client = FakeClient()
    weights = WeightSet(4, tmp_path, digests={"a": "x"}, parts={"a": ["a"]}, formats={"a": "bf16"})

    async def run() -> None:
        fleet = ready_fleet(client)
        fleet.versions.weights = weights
        await fleet.sleep()
        await fleet.sleep()
        assert [call[0] for call in client.calls] == ["pause", "release_memory"] and not fleet.roster.ready()
        client.calls.clear()
        await fleet.wake()
        await fleet.wake()
        assert fleet.roster.ready() and not fleet.roster.engines[0].asleep

    asyncio.run(run())
    assert [call[0] for call in client.calls] == [
        "take_memory", "begin_update", "load", "end_update", "take_memory", "commit", "resume",
    ]  # fmt: skip
    assert [call[1] for call in client.calls if call[0] == "take_memory"] == [("weights",), ("kv_cache", "cuda_graph")]


@pytest.mark.promise("engines sleep while the trainer has their GPUs")
def test_an_engine_that_dies_asleep_is_started_again_when_the_others_wake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then the trainer has the GPUs."""
    weights = WeightSet(4, tmp_path, digests={"a": "x"}, parts={"a": ["a"]}, formats={"a": "bf16"})
    started = []

    async def run() -> None:
        fleet = ready_fleet(FakeClient(), FakeClient())
        fleet.versions.weights = weights

        async def start(engine: Any) -> None:
            started.append(engine.server.index)
            engine.up = True

        monkeypatch.setattr(fleet.lifecycle, "_start", start)
        await fleet.sleep()
        fleet.lifecycle.restart(fleet.roster.engines[1], "it ended")
        await asyncio.sleep(0.05)
        assert started == []
        await fleet.wake()
        assert fleet.roster.engines[1].restarting is not None
        await fleet.roster.engines[1].restarting
        assert started == [1] and all(engine.synced == fleet.roster.updates for engine in fleet.roster.engines)

    asyncio.run(run())


WEIGHTS = {"digests": {"a": "x"}, "parts": {"a": ["a"]}, "formats": {"a": "bf16"}}


@pytest.mark.promise("versions are monotonic")
def test_labels_of_updates_always_grow(tmp_path: Path) -> None:
    """The trainer's version may begin anew (a restart from a checkpoint); SGLang's label must not come twice."""
    client = FakeClient()
    fleet = ready_fleet(client)
    for version in (5, 6, 2, 6):
        asyncio.run(fleet.update(WeightSet(version, tmp_path, **WEIGHTS), [], lambda: 0.0))  # type: ignore[arg-type]
    labels = [call[1]["version"] for call in client.calls if call[0] == "commit"]
    assert labels == ["5.2", "6.3", "2.4", "6.5"] and [version_of_label(text) for text in labels] == [5, 6, 2, 6]


@pytest.mark.promise("a failed sync is tried again, then stops the run")
@pytest.mark.parametrize(("action", "answer"), [("load", {"arrived": 0}), ("check", {"checked": 0})])
def test_an_engine_that_saw_less_than_was_sent_is_a_problem_and_stays_paused(
    tmp_path: Path, action: str, answer: dict[str, int]
) -> None:
    """What it would generate came of weights that are partly old."""

    class Blind(FakeClient):
        async def plugin(self, asked: str, **request: Any) -> dict[str, Any]:
            found = await super().plugin(asked, **request)
            return found | answer if asked == action else found

    client = Blind()
    fleet = ready_fleet(client)
    (update,), _ = asyncio.run(fleet.update(WeightSet(4, tmp_path, **WEIGHTS), ["a"], lambda: 0.0))  # type: ignore[arg-type]
    assert update.problems == [f"0 of 1 parts were {next(iter(answer))}"]
    assert fleet.roster.engines[0].synced == 0 and not {"commit", "resume"} & {call[0] for call in client.calls}


async def revived(fleet: Fleet, start: Callable[[Any], Awaitable[None]], index: int) -> Any:
    """The engine after its restart, which ended one way or the other."""
    engine = fleet.roster.engines[index]
    fleet.lifecycle._start = start  # type: ignore[method-assign]
    fleet.lifecycle.restart(engine, "it ended")
    fleet.lifecycle.restart(engine, "it ended")  # one at a time
    assert engine.restarting is not None
    await engine.restarting
    return engine


@pytest.mark.promise("a server that loads weights is not taken for hanging; one that does not come back is tried again")
def test_a_start_that_fails_is_tried_again_and_then_the_engine_is_broken(tmp_path: Path) -> None:
    async def run(failures: int) -> tuple[Any, int]:
        fleet, starts = ready_fleet(FakeClient(), FakeClient()), []
        fleet.versions.weights = WeightSet(4, tmp_path, **WEIGHTS)  # type: ignore[arg-type]

        async def start(engine: Any) -> None:
            starts.append(engine)
            if len(starts) <= failures:
                raise OSError("no more processes")
            engine.up = True

        return await revived(fleet, start, 1), len(starts)

    engine, starts = asyncio.run(run(2))
    assert engine.up and engine.synced == 1 and not engine.broken and starts == 3
    checks = [call[1]["parts"] for call in engine.client.calls if call[0] == "check"]
    assert checks == [["a"]]  # everything, as at a first sync
    engine, starts = asyncio.run(run(9))
    assert not engine.up and "no more processes" in str(engine.broken) and starts == lifecycle.RESTARTS


@pytest.mark.promise("a server that loads weights is not taken for hanging; one that does not come back is tried again")
def test_an_engine_that_loads_weights_is_not_taken_for_hanging() -> None:
    """Its scheduler gives no sign of life meanwhile."""

    class Busy(FakeClient):
        async def healthy(self, seconds: float) -> bool:
            return False

    async def run(synced: int) -> float:
        fleet = ready_fleet(Busy(), health_seconds=0.01)
        fleet.roster.engines[0].synced = synced

        async def start(engine: Any) -> None:
            engine.up = True

        fleet.lifecycle._start = start  # type: ignore[method-assign]
        probing = asyncio.create_task(fleet.lifecycle._probe_health())
        await asyncio.sleep(0.2)
        probing.cancel()
        return fleet.roster.counters["restarts"]

    assert asyncio.run(run(synced=0)) == 0
    assert asyncio.run(run(synced=1)) >= 1


@pytest.mark.promise("a hanging server is started again")
def test_an_engine_that_hangs_in_an_update_is_started_again(tmp_path: Path) -> None:
    class Hanging(FakeClient):
        async def pause(self, mode: str) -> None:
            raise EngineFailure("/pause_generation did not answer within 120 s")

    async def run() -> Fleet:
        fleet = ready_fleet(Hanging(), FakeClient())

        async def start(engine: Any) -> None:
            engine.client, engine.up = FakeClient(), True

        fleet.lifecycle._start = start  # type: ignore[method-assign]
        await fleet.update(WeightSet(4, tmp_path, **WEIGHTS), [], lambda: 0.0)  # type: ignore[arg-type]
        assert fleet.roster.engines[0].restarting is not None and fleet.roster.engines[1].synced == fleet.roster.updates
        await fleet.roster.engines[0].restarting
        return fleet

    roster = asyncio.run(run()).roster
    assert [engine.synced for engine in roster.engines] == [roster.updates] * 2 and roster.counters["restarts"] == 1


@pytest.mark.parametrize("lost", ["engine", "router"])
def test_a_server_that_is_started_again_is_an_event_of_the_run(tmp_path: Path, lost: str) -> None:
    """With its number and the reason, in the step in which it happened, once."""

    class FakeRouter:
        up, broken, restarting = True, None, None

        class process:
            dead = True
            alive = staticmethod(lambda: False)
            failure = staticmethod(lambda: "Killed (see sglang_router.log)")
            kill = staticmethod(lambda: None)

        async def start(self, session: Any) -> None:
            self.up = True

    async def run() -> Fleet:
        fleet = ready_fleet(FakeClient(), FakeClient())
        fleet.lifecycle._start = fleet.versions.register = anything  # type: ignore[method-assign,assignment]
        fleet.roster.notify = anything  # type: ignore[method-assign,assignment]
        fleet.lifecycle._session = object()  # type: ignore[assignment]
        if lost == "engine":
            dead: Any = fleet.roster.engines[1].server
            dead.dead, dead.failure = True, lambda: "Killed (see sglang_1.log)"
            fleet.lifecycle.suspect(fleet.roster.engines[1])
            fleet.lifecycle.suspect(fleet.roster.engines[1])
        else:
            fleet.roster.router = FakeRouter()  # type: ignore[assignment]
            fleet.lifecycle.suspect(fleet.roster.router)  # type: ignore[arg-type]
            fleet.lifecycle.suspect(fleet.roster.router)  # type: ignore[arg-type]
        return fleet

    async def anything(*given: Any) -> None:
        pass

    pool: Any = object.__new__(SglangPool)
    pool._fleet = asyncio.run(run())
    assert pool._fleet.roster.counters["restarts"] == 1
    tracker = JsonlTracker(tmp_path)
    for step in (4, 5):
        tell_notices(pool, tracker, step)
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    expected = {"engine": "SGLang server 1 is started again: it ended: Killed (see sglang_1.log)"}.get(
        lost, "sglang-router is started again: Killed (see sglang_router.log)"
    )
    assert (event["kind"], event["message"], event["data"]) == ("engine", expected, {"step": 4})


@pytest.mark.promise("a hanging server is started again")
def test_a_server_that_never_answers_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(FakeServer):
        title = "SGLang server 0"

        def start(self) -> None:
            self.url = "http://127.0.0.1:9"

        def kill(self) -> None:
            self.dead = True

        stop = kill

    async def run() -> None:
        fleet = Fleet([Silent(0)], "key", dataclasses.replace(SETTINGS, startup_seconds=0.2), FILES)  # type: ignore[list-item]
        with pytest.raises(UserError, match="(?s)SGLang server 0 did not answer within 0 s.*startup_timeout_seconds"):
            await fleet.start()
        assert fleet.roster.engines[0].server.dead  # type: ignore[attr-defined]

    asyncio.run(run())


def test_a_broadcast_that_cannot_listen_is_a_problem_of_the_sync(tmp_path: Path) -> None:
    """203.0.113.77 is an address of no machine."""
    driver = broadcast.BroadcastDriver(site(tmp_path, host="203.0.113.77"))
    fleet = ready_fleet(FakeClient(), driver=driver)
    answers, _ = asyncio.run(fleet.update(WeightSet(4, tmp_path), [], lambda: 0.0))
    assert answers[0].problems[0].startswith("broadcast: ") and fleet.roster.engines[0].synced == 0
    driver.close()


def site(folder: Path, **changes: Any) -> Site:
    there = Site("127.0.0.1", "lo", False, folder / "disk", folder, 1, TransferProtocol.tcp, [])
    return dataclasses.replace(there, **changes)


@pytest.mark.promise("a pause by abort looks once a second whether requests ended")
def test_running_requests_are_aborted_before_sglangs_own_pause_waits_for_them(tmp_path: Path) -> None:
    """Its pause looks once a second; the fleet knows when they are back."""

    class Slow(FakeClient):
        aborted = False

        async def generate(self, body: dict[str, Any]) -> Any:
            while not self.aborted:
                await asyncio.sleep(0.005)
            return reply([7, 8], "abort") if len(self.bodies) == 0 and not self.bodies.append(body) else reply([9, 4])

        async def abort_all(self) -> None:
            self.aborted = True
            self.calls.append(("abort_all",))

    async def run() -> tuple[Any, float]:
        client = Slow()
        fleet = ready_fleet(client)
        running = asyncio.create_task(fleet.complete(generation()))
        await asyncio.sleep(0.02)
        began = asyncio.get_running_loop().time()
        await fleet.update(WeightSet(4, tmp_path), [], lambda: 0.0)
        took = asyncio.get_running_loop().time() - began
        assert client.calls[0] == ("abort_all",) and ("pause", "abort") in client.calls
        return await running, took

    sample, took = asyncio.run(run())
    assert sample.response_length == 4 and took < 0.5


@pytest.mark.promise("a rejected update leaves the broadcasting side hanging until its timeout")
def test_an_engine_that_refuses_a_broadcast_does_not_leave_the_driver_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Alone:
        meeting = type("Meeting", (), {"as_dict": lambda self: {}})()

        def __init__(self, *given: Any) -> None: ...

        def described(self) -> list[Any]:
            return []

        def start(self) -> Future[str]:
            return Future()  # nobody comes: the real one waits two minutes

    class Refusing(FakeClient):
        async def plugin(self, action: str, **request: Any) -> dict[str, Any]:
            return {"problems": ["load: no"] if action == "load" else []}

    monkeypatch.setattr(broadcast, "Sender", Alone)
    fleet = ready_fleet(Refusing(), driver=broadcast.BroadcastDriver(site(tmp_path)))
    answers, _ = asyncio.run(asyncio.wait_for(fleet.update(WeightSet(4, tmp_path), [], lambda: 0.0), 5))
    assert answers[0].problems == ["load: no"] and fleet.roster.engines[0].synced == 0


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
