"""What the parts of a fleet know of its engines."""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from runner.cluster.launcher import EngineProcess
from runner.config.choices import PauseMode
from runner.errors import UserError
from runner.rollout.sglang.client import Client
from runner.rollout.sglang.router import Router


@dataclass
class Settings:
    startup_seconds: float
    request_seconds: float
    health_seconds: float
    max_retries: int
    pause_mode: PauseMode
    repacks: bool  # whether engines lay quantized weights out for a kernel: they are then checked by whole layers
    draft: frozenset[str]  # weights of the policy's export that the draft model takes


class Engine:
    """A server and what the pool knows about it. `synced`: number of the weight update that is resident; 0 is none."""

    def __init__(self, server: EngineProcess) -> None:
        self.server = server
        self.client: Client | None = None
        self.up = False
        self.synced = 0
        self.asleep = False  # without GPU memory, paused
        self.outstanding = 0  # tokens of requests it works on
        self.restarting: asyncio.Task[None] | None = None
        self.broken: UserError | None = None


class Roster:
    """The engines of a pool, the router in front of them where there is one, and which of them may be sent a request.

    The parts of a fleet share it: `lifecycle` says which engines are up, `versions` which weights they have, `dispatch` asks.
    """

    def __init__(self, servers: list[EngineProcess], settings: Settings, router: Router | None = None) -> None:
        """`router`: generation goes through it; without one an engine is chosen for every request."""
        self.engines = [Engine(server) for server in servers]
        self.router = router
        self.settings = settings
        self.updates = 0  # finished weight updates; grows always, versions of the trainer may start anew
        self.open = True  # False while weights change or engines sleep
        self.sleeping = False  # the trainer has the GPUs
        self.counters: dict[str, float] = defaultdict(float)
        self.notices: deque[str] = deque()  # for the run's events
        self._changed = asyncio.Condition()

    def ready(self) -> list[Engine]:
        """Engines that may be sent a request now: up, with the current weights, not in an update."""
        if not self.open or not self.updates or (self.router and not self.router.up):
            return []
        return [engine for engine in self.engines if self.current(engine)]

    def current(self, engine: Engine) -> bool:
        """Whether an engine is up and has the current weights."""
        return engine.up and engine.synced == self.updates > 0

    def serving(self, engine: Engine) -> bool:
        """A scheduler that loads weights gives no sign of life: those calls have their own timeouts."""
        return self.open and engine.synced == self.updates

    def targets(self) -> list[Engine | Router]:
        """Everything that a request may have been sent to."""
        return [*self.engines, *([self.router] if self.router else [])]

    def busy(self) -> bool:
        return any(target.outstanding for target in self.targets())

    async def some(self, wanted: Callable[[], list[Engine]]) -> list[Engine]:
        """What `wanted` gives as soon as it is not empty. The reason that an engine stays down, when none is left to wait for."""
        async with self._changed:
            while not (found := wanted()):
                self._raise_if_hopeless()
                await self._changed.wait()
            return found

    async def awake(self) -> None:
        """Returns when engines may have the GPUs."""
        async with self._changed:
            while self.sleeping:
                await self._changed.wait()

    async def notify(self) -> None:
        """Whoever waits looks again."""
        async with self._changed:
            self._changed.notify_all()

    def tell(self, notice: str) -> None:
        print(notice, file=sys.stderr, flush=True)
        self.notices.append(notice)

    def _raise_if_hopeless(self) -> None:
        broken = [engine.broken for engine in self.engines if engine.broken]
        if len(broken) == len(self.engines):
            raise broken[0]
        if self.router and self.router.broken:
            raise self.router.broken


@dataclass
class EngineUpdate:
    """What one engine answered to a weight update."""

    engine: Engine
    arrived: int = 0
    checked: int = 0
    problems: list[str] = field(default_factory=list)
    died: str = ""

    def take(self, answer: dict[str, Any]) -> None:
        self.problems += answer.get("problems", [])
        self.arrived += answer.get("arrived", 0)
        self.checked += answer.get("checked", 0)


def label(update: int, version: int) -> str:
    """SGLang's weight_version: it must change with every update, also when the trainer's version does not."""
    return f"{version}.{update}"


def version_of_label(text: str) -> int:
    return int(text.partition(".")[0])
