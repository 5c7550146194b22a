"""One weight update of engines, step by step, whichever transport brings the weights."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from runner.config.choices import PauseMode
from runner.rollout.sglang.client import CACHES, WEIGHTS, Client, EngineFailure, Refused
from runner.rollout.sglang.engines import Engine, EngineUpdate, Settings, label
from runner.weights.transports import Driver
from runner.weights.weight_set import WeightSet

ABORT_SECONDS = 5.0  # for aborted requests to come back, before SGLang's own pause waits for them
ABORT_POLL_SECONDS = 0.02


class Delivery:
    """Every method runs inside the event loop; the fleet sees to it that there is one delivery at a time."""

    def __init__(self, driver: Driver, settings: Settings, busy: Callable[[], bool]) -> None:
        """`driver`: brings weights to the engines; `busy`: whether any request is out."""
        self._driver, self.settings, self._busy = driver, settings, busy

    async def deliver(
        self, engines: list[Engine], weights: WeightSet, parts: list[str], update: int, *, pause: bool
    ) -> list[EngineUpdate]:
        """pause -> begin -> load -> end -> check -> commit (version and flush) -> continue, on these engines together.

        An engine that dies on the way drops out. When one reports problems, all stay paused for the next try: what they would
        generate came of weights that are partly old. `parts`: whose residency is checked; `update`: the number of this update.
        """
        updates = [EngineUpdate(engine) for engine in engines]
        asleep = [each for each in updates if each.engine.asleep]  # and so paused already
        await self._each(asleep, lambda client, _: client.take_memory(WEIGHTS))
        if pause and not asleep:
            await self._pause(updates)
        draft = weights.parts_of(name for name in weights.parts if name in self.settings.draft)
        await self._load(updates, weights, draft)
        if parts and _whole(updates):
            await self._check(updates, weights, parts, [part for part in draft if part in parts])
        await self._each(asleep, lambda client, _: client.take_memory(CACHES))
        for sleeper in asleep:
            sleeper.engine.asleep = False
        if _whole(updates):
            await self._commit(updates, label(update, weights.version), resume=pause)
        return updates

    async def put_to_sleep(self, updates: list[EngineUpdate]) -> None:
        """Nothing runs any more on these engines, and they give their memory back."""
        await self._abort_all(updates)
        await self._each(updates, lambda client, _: client.pause(PauseMode.abort))
        await self._each(updates, lambda client, _: client.release_memory())

    async def _pause(self, updates: list[EngineUpdate]) -> None:
        mode = self.settings.pause_mode
        if mode == PauseMode.abort:
            await self._abort_all(updates)
        await self._each(updates, lambda client, _: client.pause(mode))

    async def _load(self, updates: list[EngineUpdate], weights: WeightSet, draft: list[str]) -> None:
        await self._each(updates, lambda client, _: client.begin_update("all" if draft else "target"))
        await self.send("load", updates, weights, list(weights.digests), digests=weights.digests, draft=draft)
        await self._each(updates, lambda client, _: client.end_update())
        _expect(updates, "arrived", len(weights.digests))

    async def _check(self, updates: list[EngineUpdate], weights: WeightSet, parts: list[str], draft: list[str]) -> None:
        quantized = (name for name, form in weights.formats.items() if form != "bf16")
        repacked = weights.parts_of(quantized) if self.settings.repacks else []
        await self.send("check", updates, weights, parts, parts=parts, repacked=repacked, draft=draft)
        _expect(updates, "checked", len(parts))

    async def _commit(self, updates: list[EngineUpdate], named: str, *, resume: bool) -> None:
        """Without a flush, answers over cached prefixes mix old and new weights although `cached_tokens` says 0."""
        flush = self.settings.pause_mode != PauseMode.in_place
        await self._each(updates, lambda client, _: client.plugin("commit", flush=flush, version=named))
        if resume:
            await self._each(updates, lambda client, _: client.resume())

    async def _abort_all(self, updates: list[EngineUpdate]) -> None:
        """Until no request is out. SGLang's pause aborts as well, but then looks only once a second whether they ended."""
        deadline = asyncio.get_running_loop().time() + ABORT_SECONDS
        while self._busy() and asyncio.get_running_loop().time() < deadline:
            await self._each(updates, lambda client, _: client.abort_all())
            await asyncio.sleep(ABORT_POLL_SECONDS)

    async def _each(self, updates: list[EngineUpdate], call: Callable[[Client, int], Awaitable[Any]]) -> None:
        """One call to every engine that still lives, all at once; the second argument is the engine's place among those."""

        async def one(update: EngineUpdate, place: int) -> None:
            assert update.engine.client is not None
            try:
                answer = await call(update.engine.client, place)
            except EngineFailure as failure:
                update.died = str(failure)
            except Refused as refusal:
                update.problems.append(str(refusal))
            else:
                if answer is not None:
                    update.take(answer)

        living = [update for update in updates if not update.died]
        await asyncio.gather(*(one(update, place) for place, update in enumerate(living)))

    async def send(self, action: str, updates: list[EngineUpdate], weights: WeightSet, names: list[str], **request: Any) -> None:
        """A plugin action that needs these tensors (on-disk names), brought by the transport."""
        living = [update for update in updates if not update.died]
        if not living:
            return

        async def ask(offer: Callable[[int], dict[str, Any]]) -> bool:
            named = {"transport": self._driver.transport, **request}
            await self._each(living, lambda client, place: client.plugin(action, offer=offer(place), **named))
            return not any(update.problems or update.died for update in living)

        ranks = living[0].engine.server.arguments["tp_size"]
        if problem := await self._driver.carry(weights, names, len(living), ranks, ask):
            for update in living:
                if not update.died:
                    update.problems.append(problem)


def _whole(updates: list[EngineUpdate]) -> bool:
    return not any(update.problems for update in updates)


def _expect(updates: list[EngineUpdate], what: str, count: int) -> None:
    """An engine that says it is fine must also have seen everything."""
    for update in updates:
        if not update.died and not update.problems and (found := getattr(update, what)) != count:
            update.problems.append(f"{found} of {count} parts were {what}")
