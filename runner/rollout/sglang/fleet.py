"""All engines of a pool, inside the event loop: starting, choosing, watching, starting again, updating."""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from runner.errors import UserError
from runner.rollout.sglang.client import Client, EngineFailure, Refused, wait_until_ready
from runner.rollout.sglang.decoding import Generation
from runner.rollout.sglang.sender import Sender
from runner.rollout.sglang.server import Server, start_problem
from runner.rollout.sglang.weight_files import WeightSet
from runner.samples import Sample, Status

WATCH_SECONDS = 0.2  # between looks at whether the processes live
BACKOFF_SECONDS = 0.2  # doubles with every failure of a request
HEALTH_FAILURES = 2  # in a row, after which an engine counts as hung
AFFINITY_REQUESTS = 16  # a group stays on its engine until that has so many requests' tokens more to do than another
AFFINITY_PROMPTS = 4096  # remembered


@dataclass
class Settings:
    startup_seconds: float
    request_seconds: float
    health_seconds: float
    max_retries: int
    pause_mode: str
    broadcast: str | None  # backend of the distributed transport; None where weights travel as files


class Engine:
    """A server and what the pool knows about it. `synced`: number of the weight update that is resident; 0 is none."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.client: Client | None = None
        self.up = False
        self.synced = 0
        self.outstanding = 0  # tokens of requests it works on
        self.restarting: asyncio.Task[None] | None = None
        self.broken: UserError | None = None


@dataclass
class EngineUpdate:
    """What one engine answered to a weight update."""

    engine: Engine
    arrived: int = 0
    checked: int = 0
    unchecked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    died: str = ""

    def take(self, answer: dict[str, Any]) -> None:
        self.problems += answer.get("problems", [])
        self.arrived += answer.get("arrived", 0)
        self.checked += answer.get("checked", 0)
        self.unchecked += answer.get("unchecked", [])


class Fleet:
    """Every method runs inside the event loop."""

    def __init__(self, servers: list[Server], api_key: str, settings: Settings) -> None:
        self.engines = [Engine(server) for server in servers]
        self.settings = settings
        self.weights: WeightSet | None = None
        self.updates = 0  # finished weight updates; grows always, versions of the trainer may start anew
        self.counters: dict[str, float] = defaultdict(float)
        self._api_key = api_key
        self._session: aiohttp.ClientSession | None = None
        self._changed = asyncio.Condition()
        self._open = True  # False while weights change
        self._updating = asyncio.Lock()
        self._homes: OrderedDict[str, Engine] = OrderedDict()
        self._tasks: list[asyncio.Task[None]] = []
        self._aborting: set[asyncio.Task[None]] = set()
        self._closing = False

    async def start(self) -> None:
        """Start all servers at once; UserError (after stopping all of them) when one does not come up."""
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60))
        results = await asyncio.gather(*(self._start(engine) for engine in self.engines), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                await self.close()
                raise result
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._probe_health())]

    async def _start(self, engine: Engine) -> None:
        """One start, repeated with other ports where another program was faster."""
        for _ in range(3):
            engine.server.start()
            assert self._session is not None
            engine.client = Client(self._session, engine.server.url, self._api_key, self.settings.request_seconds)
            if await wait_until_ready(engine.client, engine.server.alive, self.settings.startup_seconds):
                engine.up = True
                return
            problem = start_problem(engine.server, self.settings.startup_seconds)
            engine.server.kill()
            if "port" not in problem.problem:
                break
        raise problem

    async def close(self) -> None:
        self._closing = True
        for task in (*self._tasks, *(engine.restarting for engine in self.engines if engine.restarting)):
            task.cancel()
        await asyncio.gather(*(asyncio.to_thread(engine.server.stop) for engine in self.engines))
        if self._session is not None:
            await self._session.close()

    # requests

    async def complete(self, generation: Generation) -> Sample:
        """Generate one sample, over pauses of weight updates and deaths of engines."""
        failures, attempt = 0, 0
        while True:
            engine = await self._pick(generation)
            assert engine.client is not None
            cost = generation.outstanding
            engine.outstanding += cost
            body = generation.payload(attempt)
            attempt += 1
            try:
                reason = generation.add(await engine.client.generate(body), version_of_label)
            except EngineFailure as failure:
                failures += 1
                self.counters["failures"] += 1
                if failures > self.settings.max_retries:
                    return generation.sample(Status.failed, str(failure))
                self._suspect(engine)
                await asyncio.sleep(BACKOFF_SECONDS * 2 ** (failures - 1))
                continue
            except asyncio.CancelledError:
                aborting = asyncio.create_task(self._abort(engine, body["rid"]))
                self._aborting.add(aborting)
                aborting.add_done_callback(self._aborting.discard)
                raise
            finally:
                engine.outstanding -= cost
            if reason == "abort" and len(generation.tokens) < generation.room:
                self.counters["continued"] += 1
                continue
            for name, count in generation.drafts.items():
                self.counters[f"draft_{name}"] += count
            return generation.sample(Status.completed if reason == "stop" else Status.truncated, reason)

    async def _abort(self, engine: Engine, rid: str) -> None:
        try:
            assert engine.client is not None
            await engine.client.post("/abort_request", {"rid": rid})
        except (EngineFailure, Refused):
            pass  # it is gone, and the request with it

    async def _pick(self, generation: Generation) -> Engine:
        """The engine with the fewest outstanding tokens, or the one that has seen this prompt while it is not far busier."""
        prompt = generation.request.prompt_id
        async with self._changed:
            while not (ready := self._ready()):
                self._raise_if_hopeless()
                await self._changed.wait()
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
        if not self._open or not self.updates:
            return []
        return [engine for engine in self.engines if engine.up and engine.synced == self.updates]

    def _raise_if_hopeless(self) -> None:
        broken = [engine.broken for engine in self.engines if engine.broken]
        if len(broken) == len(self.engines):
            raise broken[0]

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
            except EngineFailure:
                if attempt == self.settings.max_retries:
                    raise
                self._suspect(engine)
                await asyncio.sleep(BACKOFF_SECONDS * 2**attempt)
                continue
            return [float(entry[0]) for entry in reply["meta_info"]["input_token_logprobs"][1:]]
        raise AssertionError("unreachable")

    # watching

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for engine in self.engines:
                if engine.up and not engine.server.alive():
                    self._restart(engine, f"it ended: {engine.server.failure()}")

    async def _probe_health(self) -> None:
        failures: dict[int, int] = defaultdict(int)
        while self.settings.health_seconds:
            await asyncio.sleep(self.settings.health_seconds)
            for index, engine in enumerate(self.engines):
                if not engine.up or not self._open or engine.client is None:
                    continue
                healthy = await engine.client.healthy(max(5.0, self.settings.health_seconds))
                failures[index] = 0 if healthy or not self._open else failures[index] + 1
                if failures[index] >= HEALTH_FAILURES:
                    failures[index] = 0
                    self._restart(engine, "it hangs: no sign of life from its scheduler")

    def _suspect(self, engine: Engine) -> None:
        """After a failed call: a dead process is started again; a live one that hangs is left to `_probe_health`."""
        if engine.up and not engine.server.alive():
            self._restart(engine, f"it ended: {engine.server.failure()}")

    def _restart(self, engine: Engine, reason: str) -> None:
        if self._closing or not engine.up:
            return
        engine.up, engine.synced = False, 0
        self.counters["restarts"] += 1
        print(f"SGLang server {engine.server.index} is started again: {reason}", file=sys.stderr, flush=True)
        engine.restarting = asyncio.create_task(self._revive(engine))

    async def _revive(self, engine: Engine) -> None:
        engine.server.kill()
        try:
            await self._start(engine)
            async with self._updating:
                if self.weights is not None:
                    (update,) = await self._deliver([engine], self.weights, [], pause=False)
                    if update.died or update.problems:
                        raise UserError(
                            f"SGLang server {engine.server.index} could not be given its weights again: "
                            f"{(update.problems or [update.died])[0]}",
                            key="rollout",
                            fix=f"look at {engine.server.log}",
                        )
                    engine.synced = self.updates
        except UserError as error:
            engine.up, engine.broken = False, error
            print(f"SGLang server {engine.server.index} stays down: {error}", file=sys.stderr, flush=True)
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # weights

    async def update(self, weights: WeightSet, parts: list[str], clock: Callable[[], float]) -> tuple[list[EngineUpdate], float]:
        """Bring a set to every engine; (answers, seconds without generation). Engines that are down get it when they are back."""
        async with self._updating:
            await self._some_engine_up()
            self._open = False
            began = clock()
            try:
                engines = [engine for engine in self.engines if engine.up]
                for engine in engines:
                    engine.synced = 0
                answers = await self._deliver(engines, weights, parts, pause=True)
                good = [answer.engine for answer in answers if not answer.problems and not answer.died]
                if len(good) == len([answer for answer in answers if not answer.died]) > 0:
                    self.updates += 1
                    self.weights = weights
                    for engine in good:
                        engine.synced = self.updates
            finally:
                self._open = True
                await self._notify()
            for answer in answers:
                if answer.died:
                    self._suspect(answer.engine)
            return answers, clock() - began

    async def _some_engine_up(self) -> None:
        async with self._changed:
            while not any(engine.up for engine in self.engines):
                self._raise_if_hopeless()
                await self._changed.wait()

    async def _deliver(self, engines: list[Engine], weights: WeightSet, parts: list[str], *, pause: bool) -> list[EngineUpdate]:
        """pause -> begin -> load -> end -> check -> commit (version and flush) -> continue, on these engines together.

        An engine that dies on the way drops out; one that reports problems is still brought back to a state in which it answers.
        """
        updates = [EngineUpdate(engine) for engine in engines]
        mode = self.settings.pause_mode
        if pause:
            await self._each(updates, lambda client, _: client.pause(mode))
        await self._each(updates, lambda client, _: client.begin_update())
        await self._send("load", updates, weights, list(weights.digests), digests=weights.digests)
        await self._each(updates, lambda client, _: client.end_update())
        if parts and not any(update.problems for update in updates):
            repacked = weights.parts_of(name for name, form in weights.formats.items() if form != "bf16")
            await self._send("check", updates, weights, parts, parts=parts, repacked=repacked)
        if not any(update.problems for update in updates):
            # Without a flush, answers over cached prefixes mix old and new weights although `cached_tokens` says 0.
            named = label(self.updates + 1, weights.version)
            commit = lambda client, _: client.plugin("commit", flush=mode != "in_place", version=named)  # noqa: E731
            await self._each(updates, commit)
        if pause:
            await self._each(updates, lambda client, _: client.resume())
        return updates

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

    async def _send(self, action: str, updates: list[EngineUpdate], weights: WeightSet, names: list[str], **request: Any) -> None:
        """A plugin action that needs these tensors (on-disk names): through files, or by a broadcast beside the calls."""
        if self.settings.broadcast is None:
            files = [str(file) for file in weights.files]
            await self._each(updates, lambda client, _: client.plugin(action, files=files, **request))
            return
        living = [update for update in updates if not update.died]
        if not living:
            return
        ranks = living[0].engine.server.arguments["tp_size"]
        sender = Sender(self.settings.broadcast, 1 + ranks * len(living), weights, names)
        described = sender.described()

        def call(client: Client, place: int) -> Awaitable[Any]:
            return client.plugin(action, meeting=sender.meeting.as_dict(), rank=1 + ranks * place, buckets=described, **request)

        sent, _ = await asyncio.gather(asyncio.to_thread(sender.run), self._each(updates, call))
        for update in living:
            if sent and not update.died:
                update.problems.append(sent)

    async def ask(self, action: str, **request: Any) -> list[dict[str, Any]]:
        """Every live engine's answer to a plugin action."""
        clients = [engine.client for engine in self.engines if engine.up and engine.client]
        return list(await asyncio.gather(*(client.plugin(action, **request) for client in clients)))


def label(update: int, version: int) -> str:
    """SGLang's weight_version: it must change with every update, also when the trainer's version does not."""
    return f"{version}.{update}"


def version_of_label(text: str) -> int:
    return int(text.partition(".")[0])
