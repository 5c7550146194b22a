"""All engines of a pool, inside the event loop.

lifecycle.py    their processes: starting, watching, starting again
dispatch.py     requests: which engine gets one, and what becomes of it when that dies
versions.py     weights: updates, and sleep between them
engines.py      what these three know together
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from runner.cluster.launcher import EngineProcess
from runner.data import Sample
from runner.errors import UserError
from runner.rollout.sglang.decoding import Generation
from runner.rollout.sglang.dispatch import Dispatch
from runner.rollout.sglang.engines import EngineUpdate, Roster, Settings
from runner.rollout.sglang.lifecycle import Lifecycle
from runner.rollout.sglang.router import Router
from runner.rollout.sglang.versions import Versions
from runner.weights.transports import Driver
from runner.weights.weight_set import WeightSet


class Fleet:
    """The pool's view of them. Every method runs inside the event loop."""

    def __init__(
        self, servers: list[EngineProcess], api_key: str, settings: Settings, driver: Driver, router: Router | None = None
    ) -> None:
        """`driver`: brings weights to the engines. `router`: generation goes through it; without one the fleet chooses an engine
        for every request itself."""
        self.roster = Roster(servers, settings, router)
        self.versions = Versions(self.roster, driver)
        self.lifecycle = Lifecycle(self.roster, self.versions, api_key)
        self.dispatch = Dispatch(self.roster, self.lifecycle.suspect)

    async def start(self) -> None:
        """Start all servers at once; UserError (after stopping all of them) when one does not come up."""
        await self.lifecycle.start()

    async def close(self) -> None:
        await self.lifecycle.close()

    async def complete(self, generation: Generation) -> Sample:
        """Generate one sample, over pauses of weight updates and deaths of engines."""
        return await self.dispatch.complete(generation)

    async def score(self, tokens: list[int]) -> list[float]:
        """Logprobs of tokens[1:] at temperature 1; retried like a sample."""
        return await self.dispatch.score(tokens)

    async def update(self, weights: WeightSet, parts: list[str], clock: Callable[[], float]) -> tuple[list[EngineUpdate], float]:
        """Bring a set to every engine; (answers, seconds without generation). Engines that are down get it when they are back."""
        answers, seconds = await self.versions.update(weights, parts, clock)
        self._restart_lost(answers)
        return answers, seconds

    async def sleep(self) -> None:
        """Every engine gives its GPU memory back and generates nothing until `update` or `wake`; UserError when one keeps it.
        Safe to call again."""
        answers = await self.versions.sleep()
        self._restart_lost(answers)
        for answer in answers:
            if answer.problems:
                who = f"SGLang server {answer.engine.server.index}"
                raise UserError(f"{who} keeps its GPU memory: {answer.problems[0]}", key="rollout")

    async def wake(self) -> None:
        """Engines take their memory again and get the weights that they had. UserError when one does not take them."""
        if not self.roster.sleeping or self.versions.weights is None:
            return
        answers, _ = await self.update(self.versions.weights, [], asyncio.get_running_loop().time)
        problems = [problem for answer in answers for problem in answer.problems]
        if problems:
            raise UserError(f"weights did not come back into an engine: {problems[0]}", key="rollout")

    async def ask(self, action: str, **request: Any) -> list[dict[str, Any]]:
        """Every live engine's answer to a plugin action."""
        clients = [engine.client for engine in self.roster.engines if engine.up and engine.client]
        return list(await asyncio.gather(*(client.plugin(action, **request) for client in clients)))

    def _restart_lost(self, answers: list[EngineUpdate]) -> None:
        """An engine that died, or hangs, has no weights, so nothing else would find it."""
        for answer in answers:
            if answer.died:
                self.lifecycle.restart(answer.engine, answer.died)
