"""Processes of a pool, its servers and its router: starting, watching, starting again, ending."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import aiohttp

from runner.errors import Failure, UserError
from runner.rollout.sglang.client import EngineFailure, Refused, wait_until_ready
from runner.rollout.sglang.engines import Engine, Roster
from runner.rollout.sglang.process import PORT_TAKEN, start_problem
from runner.rollout.sglang.router import Router
from runner.rollout.sglang.versions import Versions

WATCH_SECONDS = 0.2  # between looks at whether the processes live
HEALTH_FAILURES = 2  # in a row, after which an engine counts as hung
RESTARTS = 3  # starts of an engine that died, until it counts as broken


class Lifecycle:
    """Every method runs inside the event loop."""

    def __init__(self, roster: Roster, versions: Versions, api_key: str) -> None:
        """`versions` gives an engine that was started again its weights."""
        self._roster, self._versions, self._api_key = roster, versions, api_key
        self._session: aiohttp.ClientSession | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    async def start(self) -> None:
        """Start all servers at once; UserError (after stopping all of them) when one does not come up."""
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60))
        starts = [self._start(engine) for engine in self._roster.engines]
        if self._roster.router:
            starts.append(self._roster.router.start(self._session))
        results = await asyncio.gather(*starts, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                await self.close()
                raise result
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._probe_health())]

    async def close(self) -> None:
        self._closing = True
        router = self._roster.router
        for task in (*self._tasks, *(target.restarting for target in self._roster.targets() if target.restarting)):
            task.cancel()
        stops = [*(engine.server.stop for engine in self._roster.engines), *([router.process.stop] if router else [])]
        await asyncio.gather(*map(asyncio.to_thread, stops))
        if self._session is not None:
            await self._session.close()

    def suspect(self, target: Engine | Router) -> None:
        """After a failed call: a dead process is started again; a live one that hangs is left to `_probe_health`."""
        router = self._roster.router
        if router and router.up and not router.process.alive() and not self._closing:
            router.up = False
            self._roster.counters["restarts"] += 1
            self._roster.tell(f"sglang-router is started again: {router.process.failure()}")
            router.restarting = asyncio.create_task(self._revive_router(router))
        for engine in [target] if isinstance(target, Engine) else self._roster.engines:
            if engine.up and not engine.server.alive():
                self.restart(engine, f"it ended: {engine.server.failure()}")

    def restart(self, engine: Engine, reason: str) -> None:
        """Begin to start it again, unless that is under way."""
        if self._closing or not engine.up or (engine.restarting and not engine.restarting.done()):
            return  # `_revive` sees for itself that the engine ended
        engine.up, engine.synced = False, 0
        self._roster.counters["restarts"] += 1
        self._roster.tell(f"SGLang server {engine.server.index} is started again: {reason}")
        engine.restarting = asyncio.create_task(self._revive(engine))

    async def _start(self, engine: Engine) -> None:
        """One start, repeated with other ports where another program was faster."""
        settings = self._roster.settings
        for _ in range(3):
            await asyncio.to_thread(engine.server.start)  # on another node it takes a moment
            assert self._session is not None
            seconds = (settings.request_seconds, settings.startup_seconds)
            engine.client = engine.server.client(self._session, self._api_key, *seconds)
            if await wait_until_ready(engine.client, engine.server.alive, settings.startup_seconds):
                engine.up = True
                return
            problem = start_problem(engine.server, settings.startup_seconds)
            await asyncio.to_thread(engine.server.kill)
            if PORT_TAKEN not in problem.problem:
                break
        raise problem

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for engine in self._roster.engines:
                if engine.up and not engine.server.alive():
                    self.restart(engine, f"it ended: {engine.server.failure()}")
            router = self._roster.router
            if router and router.up and not router.process.alive():
                self.suspect(router)

    async def _probe_health(self) -> None:
        failures: dict[int, int] = defaultdict(int)
        interval, serving = self._roster.settings.health_seconds, self._roster.serving
        while interval:
            await asyncio.sleep(interval)
            for index, engine in enumerate(self._roster.engines):
                if not engine.up or not serving(engine) or engine.client is None:
                    continue
                healthy = await engine.client.healthy(max(5.0, interval))
                failures[index] = 0 if healthy or not serving(engine) else failures[index] + 1
                if failures[index] >= HEALTH_FAILURES:
                    failures[index] = 0
                    self.restart(engine, "it hangs: no sign of life from its scheduler")

    async def _revive_router(self, router: Router) -> None:
        await asyncio.to_thread(router.process.kill)
        try:
            assert self._session is not None
            await router.start(self._session)
            await self._versions.register()
        except UserError as error:
            router.up, router.broken = False, error
        await self._roster.notify()

    async def _revive(self, engine: Engine) -> None:
        """A few starts; after that the engine stays down, and the run ends when no other one is left."""
        problem: Exception | None = None
        for _ in range(RESTARTS):
            await asyncio.to_thread(engine.server.kill)
            engine.up = engine.asleep = False
            await self._roster.awake()
            try:
                await self._start_with_weights(engine)
            except (UserError, EngineFailure, Refused, OSError) as error:
                problem = error
                self._roster.tell(f"SGLang server {engine.server.index} did not come back: {error}")
            else:
                await self._roster.notify()
                return
        await asyncio.to_thread(engine.server.kill)
        engine.up = False
        why = (problem.problem, problem.fix) if isinstance(problem, UserError) else (str(problem), None)
        engine.broken = Failure(why[0], key="rollout", fix=why[1])
        self._roster.tell(f"SGLang server {engine.server.index} stays down")
        await self._roster.notify()

    async def _start_with_weights(self, engine: Engine) -> None:
        if self._roster.router:
            await self._roster.router.drop(engine.server.url)
        await self._start(engine)
        await self._versions.give(engine)
