"""Engines that die, hang or never come up are started again, or end the run: against engines that only pretend."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="make setup-sglang")


from fleets import FILES, SETTINGS, WEIGHTS, FakeClient, FakeServer, ready_fleet

from runner.errors import UserError
from runner.rollout.sglang import SglangPool, lifecycle
from runner.rollout.sglang.client import EngineFailure
from runner.rollout.sglang.fleet import Fleet
from runner.run.loop import tell_notices
from runner.tracking.tracker import JsonlTracker
from runner.weights.weight_set import WeightSet


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
