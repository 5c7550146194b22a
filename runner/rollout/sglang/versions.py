"""Which weights the engines of a pool have: updates of all of them, and of one that was started again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from runner.errors import UserError
from runner.rollout.sglang.client import EngineFailure
from runner.rollout.sglang.delivery import Delivery
from runner.rollout.sglang.engines import Engine, EngineUpdate, Roster
from runner.weights.transports import Driver
from runner.weights.weight_set import WeightSet


class Versions:
    """Every method runs inside the event loop. One update at a time; engines that died in one are the caller's to start again."""

    def __init__(self, roster: Roster, driver: Driver) -> None:
        """`driver`: brings weights to the engines."""
        self._roster = roster
        self.weights: WeightSet | None = None  # what every engine has, or gets when it is back
        self.delivery = Delivery(driver, roster.settings, roster.busy)
        self._updating = asyncio.Lock()

    async def update(self, weights: WeightSet, parts: list[str], clock: Callable[[], float]) -> tuple[list[EngineUpdate], float]:
        """Bring a set to every engine; (answers, seconds without generation). Engines that are down get it when they are back."""
        roster = self._roster
        async with self._updating:
            roster.sleeping = False
            await roster.notify()
            await roster.some(lambda: [engine for engine in roster.engines if engine.up])
            roster.open = False
            began = clock()
            try:
                engines = [engine for engine in roster.engines if engine.up]
                for engine in engines:
                    engine.synced = 0
                answers = await self.delivery.deliver(engines, weights, parts, roster.updates + 1, pause=True)
                good = [answer.engine for answer in answers if not answer.problems and not answer.died]
                if len(good) == len([answer for answer in answers if not answer.died]) > 0:
                    roster.updates += 1
                    self.weights = weights
                    for engine in good:
                        engine.synced = roster.updates
                    await self.register()
            finally:
                roster.open = True
                await roster.notify()
            return answers, clock() - began

    async def sleep(self) -> list[EngineUpdate]:
        """Every engine gives its GPU memory back and generates nothing until `update`; their answers. Safe to call again."""
        async with self._updating:
            self._roster.open, self._roster.sleeping = False, True
            answers = [EngineUpdate(engine) for engine in self._roster.engines if engine.up and not engine.asleep]
            await self.delivery.put_to_sleep(answers)
            for answer in answers:
                answer.engine.asleep = not answer.died and not answer.problems
            return answers

    async def give(self, engine: Engine) -> None:
        """The current weights to an engine that was started; everything resident is checked, as at a first sync.
        UserError when it does not take them."""
        async with self._updating:
            if self.weights is None:
                return
            parts = self.weights.parts_of(self.weights.parts)
            (answer,) = await self.delivery.deliver([engine], self.weights, parts, self._roster.updates + 1, pause=False)
            if answer.died or answer.problems:
                raise UserError(
                    f"SGLang server {engine.server.index} could not be given its weights again: "
                    f"{(answer.problems or [answer.died])[0]}",
                    key="rollout",
                    fix=f"look at {engine.server.log}",
                )
            engine.synced = self._roster.updates
            await self.register()

    async def register(self) -> None:
        """Tell the router which engines have the current weights."""
        if router := self._roster.router:
            with contextlib.suppress(EngineFailure):  # it died: it is started again, and told then
                await router.register({engine.server.url for engine in self._roster.engines if self._roster.current(engine)})
