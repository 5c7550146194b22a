"""Requests to the engines of a pool: which one gets a request, and what becomes of one whose engine died or was paused."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from runner.data import Sample, Status
from runner.rollout.sglang.client import EngineFailure, Refused
from runner.rollout.sglang.decoding import Generation, finite_logprobs
from runner.rollout.sglang.engines import Engine, Roster, version_of_label
from runner.rollout.sglang.router import Router

BACKOFF_SECONDS = 0.2  # doubles with every failure of a request
AFFINITY_REQUESTS = 16  # a group stays on its engine until that has so many requests' tokens more to do than another
AFFINITY_PROMPTS = 4096  # remembered


class Dispatch:
    """Every method runs inside the event loop."""

    def __init__(self, roster: Roster, suspect: Callable[[Engine | Router], None]) -> None:
        """`suspect` is told of every target whose call failed."""
        self._roster, self._suspect = roster, suspect
        self._homes: OrderedDict[str, Engine] = OrderedDict()
        self._aborting: set[asyncio.Task[None]] = set()

    async def complete(self, generation: Generation) -> Sample:
        """Generate one sample, over pauses of weight updates and deaths of engines."""
        counters, failures, attempt = self._roster.counters, 0, 0
        while True:
            target = await self._pick(generation)
            assert target.client is not None
            cost = generation.outstanding
            target.outstanding += cost
            body = generation.payload(attempt)
            attempt += 1
            began = time.time()
            try:
                reason = generation.add(await target.client.generate(body), version_of_label)
            except EngineFailure as failure:
                failures += 1
                counters["failures"] += 1
                if failures > self._roster.settings.max_retries:
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
                generation.served.append((_name(target), began, time.time()))
            if reason == "abort" and len(generation.tokens) < generation.room:
                counters["continued"] += 1
                continue
            for name, count in generation.drafts.items():
                counters[f"draft_{name}"] += count
            counters["cached_tokens"] += generation.cached
            return generation.sample(Status.completed if reason == "stop" else Status.truncated, reason)

    async def score(self, tokens: list[int]) -> list[float]:
        """Logprobs of tokens[1:] at temperature 1; retried like a sample."""
        body: dict[str, Any] = {
            "input_ids": tokens,
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        retries = self._roster.settings.max_retries
        for attempt in range(retries + 1):
            ready = await self._roster.some(self._roster.ready)
            engine = min(ready, key=lambda candidate: candidate.outstanding)
            assert engine.client is not None
            try:
                reply = await engine.client.generate(body)
                return finite_logprobs(reply["meta_info"]["input_token_logprobs"][1:], "a scored sequence")
            except EngineFailure:
                if attempt == retries:
                    raise
                self._suspect(engine)
                await asyncio.sleep(BACKOFF_SECONDS * 2**attempt)
        raise AssertionError("unreachable")

    async def _pick(self, generation: Generation) -> Engine | Router:
        """The engine with the fewest outstanding tokens, or the one that has seen this prompt while it is not far busier;
        the router where there is one."""
        ready = await self._roster.some(self._roster.ready)
        if self._roster.router:
            return self._roster.router
        prompt = generation.request.prompt_id
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

    async def _abort(self, target: Engine | Router, rid: str) -> None:
        """The router does not pass aborts on and does not say whom it chose: then every engine is asked."""
        engines = [target] if isinstance(target, Engine) else [engine for engine in self._roster.engines if engine.up]
        for engine in engines:
            assert engine.client is not None
            with contextlib.suppress(EngineFailure, Refused):  # it is gone, and the request with it
                await engine.client.post("/abort_request", {"rid": rid})


def _name(target: Engine | Router) -> str:
    """Of a timeline's row: which engine the router chose, it does not say."""
    return f"engine {target.server.index}" if isinstance(target, Engine) else "engines behind the router"
