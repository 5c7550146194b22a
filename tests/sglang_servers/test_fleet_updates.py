"""How the pool orders an update, and what of it is a problem, against engines that only pretend."""

from __future__ import annotations

import asyncio
import dataclasses
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="make setup-sglang")


from fleets import WEIGHTS, FakeClient, generation, ready_fleet, reply

from runner.config.choices import PauseMode, TransferProtocol
from runner.rollout.sglang.engines import version_of_label
from runner.weights.transports import Site, broadcast
from runner.weights.weight_set import WeightSet


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
