"""All engines of a pool, inside the event loop: starting, choosing, watching, starting again, updating."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import aiohttp

from runner.cluster.launcher import EngineProcess
from runner.data import Sample, Status
from runner.errors import Failure, UserError
from runner.rollout.sglang.client import EngineFailure, Refused, wait_until_ready
from runner.rollout.sglang.decoding import Generation, finite_logprobs
from runner.rollout.sglang.delivery import Delivery
from runner.rollout.sglang.engines import Engine, EngineUpdate, Settings, version_of_label
from runner.rollout.sglang.process import PORT_TAKEN, start_problem
from runner.rollout.sglang.router import Router
from runner.weights.transports import Driver
from runner.weights.weight_set import WeightSet

WATCH_SECONDS = 0.2  # between looks at whether the processes live
BACKOFF_SECONDS = 0.2  # doubles with every failure of a request
HEALTH_FAILURES = 2  # in a row, after which an engine counts as hung
AFFINITY_REQUESTS = 16  # a group stays on its engine until that has so many requests' tokens more to do than another
AFFINITY_PROMPTS = 4096  # remembered
RESTARTS = 3  # starts of an engine that died, until it counts as broken


class Fleet:
    """Every method runs inside the event loop."""

    def __init__(
        self, servers: list[EngineProcess], api_key: str, settings: Settings, driver: Driver, router: Router | None = None
    ) -> None:
        """`driver`: brings weights to the engines. `router`: generation goes through it; without one the fleet chooses an engine
        for every request itself."""
        self.engines = [Engine(server) for server in servers]
        self.router = router
        self.settings = settings
        self.weights: WeightSet | None = None
        self.updates = 0  # finished weight updates; grows always, versions of the trainer may start anew
        self.counters: dict[str, float] = defaultdict(float)
        self.notices: deque[str] = deque()  # for the run's events
        self.delivery = Delivery(driver, settings, self._busy)
        self._api_key = api_key
        self._session: aiohttp.ClientSession | None = None
        self._changed = asyncio.Condition()
        self._open = True  # False while weights change or engines sleep
        self._sleeping = False
        self._updating = asyncio.Lock()
        self._homes: OrderedDict[str, Engine] = OrderedDict()
        self._tasks: list[asyncio.Task[None]] = []
        self._aborting: set[asyncio.Task[None]] = set()
        self._closing = False

    async def start(self) -> None:
        """Start all servers at once; UserError (after stopping all of them) when one does not come up."""
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60))
        starts = [self._start(engine) for engine in self.engines]
        if self.router:
            starts.append(self.router.start(self._session))
        results = await asyncio.gather(*starts, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                await self.close()
                raise result
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._probe_health())]

    async def _start(self, engine: Engine) -> None:
        """One start, repeated with other ports where another program was faster."""
        for _ in range(3):
            await asyncio.to_thread(engine.server.start)  # on another node it takes a moment
            assert self._session is not None
            seconds = (self.settings.request_seconds, self.settings.startup_seconds)
            engine.client = engine.server.client(self._session, self._api_key, *seconds)
            if await wait_until_ready(engine.client, engine.server.alive, self.settings.startup_seconds):
                engine.up = True
                return
            problem = start_problem(engine.server, self.settings.startup_seconds)
            await asyncio.to_thread(engine.server.kill)
            if PORT_TAKEN not in problem.problem:
                break
        raise problem

    async def close(self) -> None:
        self._closing = True
        for task in (*self._tasks, *(target.restarting for target in self._targets() if target.restarting)):
            task.cancel()
        stops = [*(engine.server.stop for engine in self.engines), *([self.router.process.stop] if self.router else [])]
        await asyncio.gather(*map(asyncio.to_thread, stops))
        if self._session is not None:
            await self._session.close()

    # requests

    async def complete(self, generation: Generation) -> Sample:
        """Generate one sample, over pauses of weight updates and deaths of engines."""
        failures, attempt = 0, 0
        while True:
            target = await self._pick(generation)
            assert target.client is not None
            cost = generation.outstanding
            target.outstanding += cost
            body = generation.payload(attempt)
            attempt += 1
            try:
                reason = generation.add(await target.client.generate(body), version_of_label)
            except EngineFailure as failure:
                failures += 1
                self.counters["failures"] += 1
                if failures > self.settings.max_retries:
                    return generation.sample(Status.failed, str(failure))
                self._suspect(target)
                await asyncio.sleep(BACKOFF_SECONDS * 2 ** (failures - 1))
                continue
            except asyncio.CancelledError:
                aborting = asyncio.create_task(self._abort(target, body["rid"]))
                self._aborting.add(aborting)
                aborting.add_done_callback(self._aborting.discard)
                raise
            finally:
                target.outstanding -= cost
            if reason == "abort" and len(generation.tokens) < generation.room:
                self.counters["continued"] += 1
                continue
            for name, count in generation.drafts.items():
                self.counters[f"draft_{name}"] += count
            self.counters["cached_tokens"] += generation.cached
            return generation.sample(Status.completed if reason == "stop" else Status.truncated, reason)

    async def _abort(self, target: Engine | Router, rid: str) -> None:
        """The router does not pass aborts on and does not say whom it chose: then every engine is asked."""
        engines = [target] if isinstance(target, Engine) else [engine for engine in self.engines if engine.up]
        for engine in engines:
            assert engine.client is not None
            with contextlib.suppress(EngineFailure, Refused):  # it is gone, and the request with it
                await engine.client.post("/abort_request", {"rid": rid})

    async def _pick(self, generation: Generation) -> Engine | Router:
        """The engine with the fewest outstanding tokens, or the one that has seen this prompt while it is not far busier;
        the router where there is one."""
        prompt = generation.request.prompt_id
        async with self._changed:
            while not (ready := self._ready()):
                self._raise_if_hopeless()
                await self._changed.wait()
            if self.router:
                return self.router
            idlest = min(ready, key=lambda engine: engine.outstanding)
            home = self._homes.get(prompt)
            slack = AFFINITY_REQUESTS * generation.outstanding
            chosen = home if home in ready and home.outstanding <= idlest.outstanding + slack else idlest
            assert chosen is not None
            self._homes[prompt] = chosen
            self._homes.move_to_end(prompt)
            while len(self._homes) > AFFINITY_PROMPTS:
                self._homes.popitem(last=False)
            return chosen

    def _ready(self) -> list[Engine]:
        if not self._open or not self.updates or (self.router and not self.router.up):
            return []
        return [engine for engine in self.engines if engine.up and engine.synced == self.updates]

    def _targets(self) -> list[Engine | Router]:
        """Everything that a request may have been sent to."""
        return [*self.engines, *([self.router] if self.router else [])]

    def _busy(self) -> bool:
        return any(target.outstanding for target in self._targets())

    def _raise_if_hopeless(self) -> None:
        broken = [engine.broken for engine in self.engines if engine.broken]
        if len(broken) == len(self.engines):
            raise broken[0]
        if self.router and self.router.broken:
            raise self.router.broken

    async def score(self, tokens: list[int]) -> list[float]:
        """Logprobs of tokens[1:] at temperature 1; retried like a sample."""
        body = {
            "input_ids": tokens,
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        for attempt in range(self.settings.max_retries + 1):
            async with self._changed:
                while not (ready := self._ready()):
                    self._raise_if_hopeless()
                    await self._changed.wait()
            engine = min(ready, key=lambda candidate: candidate.outstanding)
            assert engine.client is not None
            try:
                reply = await engine.client.generate(body)
                return finite_logprobs(reply["meta_info"]["input_token_logprobs"][1:], "a scored sequence")
            except EngineFailure:
                if attempt == self.settings.max_retries:
                    raise
                self._suspect(engine)
                await asyncio.sleep(BACKOFF_SECONDS * 2**attempt)
        raise AssertionError("unreachable")

    # watching

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for engine in self.engines:
                if engine.up and not engine.server.alive():
                    self._restart(engine, f"it ended: {engine.server.failure()}")
            if self.router and self.router.up and not self.router.process.alive():
                self._suspect(self.router)

    async def _probe_health(self) -> None:
        failures: dict[int, int] = defaultdict(int)
        while self.settings.health_seconds:
            await asyncio.sleep(self.settings.health_seconds)
            for index, engine in enumerate(self.engines):
                if not engine.up or not self._serving(engine) or engine.client is None:
                    continue
                healthy = await engine.client.healthy(max(5.0, self.settings.health_seconds))
                failures[index] = 0 if healthy or not self._serving(engine) else failures[index] + 1
                if failures[index] >= HEALTH_FAILURES:
                    failures[index] = 0
                    self._restart(engine, "it hangs: no sign of life from its scheduler")

    def _serving(self, engine: Engine) -> bool:
        """A scheduler that loads weights gives no sign of life: those calls have their own timeouts."""
        return self._open and engine.synced == self.updates

    def _suspect(self, target: Engine | Router) -> None:
        """After a failed call: a dead process is started again; a live one that hangs is left to `_probe_health`."""
        if self.router and self.router.up and not self.router.process.alive() and not self._closing:
            self.router.up = False
            self.counters["restarts"] += 1
            self._tell(f"sglang-router is started again: {self.router.process.failure()}")
            self.router.restarting = asyncio.create_task(self._revive_router(self.router))
        for engine in [target] if isinstance(target, Engine) else self.engines:
            if engine.up and not engine.server.alive():
                self._restart(engine, f"it ended: {engine.server.failure()}")

    def _tell(self, notice: str) -> None:
        print(notice, file=sys.stderr, flush=True)
        self.notices.append(notice)

    def _restart(self, engine: Engine, reason: str) -> None:
        if self._closing or not engine.up or (engine.restarting and not engine.restarting.done()):
            return  # `_revive` sees for itself that the engine ended
        engine.up, engine.synced = False, 0
        self.counters["restarts"] += 1
        self._tell(f"SGLang server {engine.server.index} is started again: {reason}")
        engine.restarting = asyncio.create_task(self._revive(engine))

    async def _revive_router(self, router: Router) -> None:
        await asyncio.to_thread(router.process.kill)
        try:
            assert self._session is not None
            await router.start(self._session)
            await self._register()
        except UserError as error:
            router.up, router.broken = False, error
        await self._notify()

    async def _revive(self, engine: Engine) -> None:
        """A few starts; after that the engine stays down, and the run ends when no other one is left."""
        problem: Exception | None = None
        for _ in range(RESTARTS):
            await asyncio.to_thread(engine.server.kill)
            engine.up = engine.asleep = False
            async with self._changed:
                while self._sleeping:  # somebody else has the GPUs
                    await self._changed.wait()
            try:
                await self._start_with_weights(engine)
            except (UserError, EngineFailure, Refused, OSError) as error:
                problem = error
                self._tell(f"SGLang server {engine.server.index} did not come back: {error}")
            else:
                await self._notify()
                return
        await asyncio.to_thread(engine.server.kill)
        engine.up = False
        why = (problem.problem, problem.fix) if isinstance(problem, UserError) else (str(problem), None)
        engine.broken = Failure(why[0], key="rollout", fix=why[1])
        self._tell(f"SGLang server {engine.server.index} stays down")
        await self._notify()

    async def _start_with_weights(self, engine: Engine) -> None:
        """Everything resident is checked, as at a first sync."""
        if self.router:
            await self.router.drop(engine.server.url)
        await self._start(engine)
        async with self._updating:
            if self.weights is None:
                return
            parts = self.weights.parts_of(self.weights.parts)
            (update,) = await self.delivery.deliver([engine], self.weights, parts, self.updates + 1, pause=False)
            if update.died or update.problems:
                raise UserError(
                    f"SGLang server {engine.server.index} could not be given its weights again: "
                    f"{(update.problems or [update.died])[0]}",
                    key="rollout",
                    fix=f"look at {engine.server.log}",
                )
            engine.synced = self.updates
            await self._register()

    async def _register(self) -> None:
        """Tell the router which engines have the current weights."""
        if self.router:
            with contextlib.suppress(EngineFailure):  # it died: `_revive_router` registers them anew
                await self.router.register({e.server.url for e in self.engines if e.up and e.synced == self.updates > 0})

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # weights

    async def update(self, weights: WeightSet, parts: list[str], clock: Callable[[], float]) -> tuple[list[EngineUpdate], float]:
        """Bring a set to every engine; (answers, seconds without generation). Engines that are down get it when they are back."""
        async with self._updating:
            self._sleeping = False
            await self._notify()
            await self._some_engine_up()
            self._open = False
            began = clock()
            try:
                engines = [engine for engine in self.engines if engine.up]
                for engine in engines:
                    engine.synced = 0
                answers = await self.delivery.deliver(engines, weights, parts, self.updates + 1, pause=True)
                good = [answer.engine for answer in answers if not answer.problems and not answer.died]
                if len(good) == len([answer for answer in answers if not answer.died]) > 0:
                    self.updates += 1
                    self.weights = weights
                    for engine in good:
                        engine.synced = self.updates
                    await self._register()
            finally:
                self._open = True
                await self._notify()
            for answer in answers:
                if answer.died:  # or hangs: it has no weights, so nothing else would find it
                    self._restart(answer.engine, answer.died)
            return answers, clock() - began

    async def sleep(self) -> None:
        """Every engine gives its GPU memory back and generates nothing until `update` or `wake`. Safe to call again."""
        async with self._updating:
            self._open, self._sleeping = False, True
            updates = [EngineUpdate(engine) for engine in self.engines if engine.up and not engine.asleep]
            await self.delivery.put_to_sleep(updates)
            for update in updates:
                if update.problems:
                    who = f"SGLang server {update.engine.server.index}"
                    raise UserError(f"{who} keeps its GPU memory: {update.problems[0]}", key="rollout")
                update.engine.asleep = not update.died
                if update.died:
                    self._restart(update.engine, update.died)

    async def wake(self) -> None:
        """Engines take their memory again and get the weights that they had. UserError when one does not take them."""
        if not self._sleeping or self.weights is None:
            return
        updates, _ = await self.update(self.weights, [], asyncio.get_running_loop().time)
        problems = [problem for update in updates for problem in update.problems]
        if problems:
            raise UserError(f"weights did not come back into an engine: {problems[0]}", key="rollout")

    async def _some_engine_up(self) -> None:
        async with self._changed:
            while not any(engine.up for engine in self.engines):
                self._raise_if_hopeless()
                await self._changed.wait()

    async def ask(self, action: str, **request: Any) -> list[dict[str, Any]]:
        """Every live engine's answer to a plugin action."""
        clients = [engine.client for engine in self.engines if engine.up and engine.client]
        return list(await asyncio.gather(*(client.plugin(action, **request) for client in clients)))
