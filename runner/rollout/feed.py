"""Requests that come while others run: what an engine pulls from where conversations take turns with their environments."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from runner.data import Request

WATCH_SECONDS = 0.5  # between looks at whether somebody hangs, while an engine has nothing to do


class Feed(Iterator[Request | None]):
    """An iterator for `RolloutPool.generate` that never blocks an engine which has something to do.

    `next` gives a request; None where there is none now and the engine should go on with what it runs; StopIteration where no
    more will come. It waits only where the engine has nothing to run. `put`, `end` and `close` may be called from any thread.

    An engine whose results depend on who shares a batch is served in lockstep: `wait_seconds` above 0 lets it wait that long
    for conversations that are in their environments (`busy` of them), and hands requests out in the order of their conversations.
    The same conversations then share the same batches, run after run, as long as environments answer within that time.
    """

    def __init__(self, wait_seconds: float = 0.0) -> None:
        self.wait_seconds = wait_seconds
        self.woken: Callable[[], None] = lambda: None  # called, from any thread, when there is something new
        self.watch: Callable[[], None] = lambda: None  # called in the engine's thread while it waits; may raise
        self._condition = threading.Condition()
        self._waiting: list[tuple[int, int, Request]] = []  # (conversation's place, order of arrival, request)
        self._ready: list[Request] = []
        self._forgotten: list[str] = []
        self._asked: dict[int, int] = {}  # requests without an answer, of each conversation that goes on
        self._arrivals = 0
        self._running = 0  # handed out and not answered
        self._busy = 0  # conversations that will ask again, or end
        self._closed = False
        self._late = False  # somebody did not answer in time: not waited for again until everyone has

    def put(self, request: Request, place: int) -> None:
        """A request of conversation number `place`; a conversation is busy while it waits for no answer."""
        with self._condition:
            self._waiting.append((place, self._arrivals, request))
            self._arrivals += 1
            self._asked[place] += 1
            if self._asked[place] == 1:
                self._settled()
        self.woken()

    def begin(self, place: int) -> None:
        with self._condition:
            self._asked[place] = 0
            self._busy += 1

    def end(self, place: int) -> None:
        """A conversation is over. Nobody waits for the answers of requests that it may have left behind."""
        with self._condition:
            if self._asked.pop(place) == 0:
                self._settled()
        self.woken()

    def delivered(self, place: int) -> None:
        """An answer reached its conversation, or nobody where that is over."""
        with self._condition:
            self._running -= 1
            if place in self._asked:
                self._asked[place] -= 1
                self._busy += self._asked[place] == 0

    def forget(self, conversation: str) -> None:
        """What an engine keeps of this conversation (`Request.conversation`) is of no more use."""
        with self._condition:
            self._forgotten.append(conversation)

    def forgotten(self) -> list[str]:
        """Those that were named since the last call."""
        with self._condition:
            gone, self._forgotten = self._forgotten, []
            return gone

    def _settled(self) -> None:
        self._busy -= 1
        self._late = self._late and self._busy > 0
        self._condition.notify_all()

    def close(self) -> None:
        """No more requests will come."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self.woken()

    def __next__(self) -> Request | None:
        with self._condition:
            if not self._ready:
                self._collect()
            if self._ready:
                self._running += 1
                return self._ready.pop(0)
            if self._closed and not self._busy and not self._running:
                raise StopIteration
            return None

    def _collect(self) -> None:
        deadline = time.monotonic() + self.wait_seconds
        while self._busy and not self._late and (left := deadline - time.monotonic()) > 0:
            self._condition.wait(min(left, WATCH_SECONDS))
            self.watch()
        self._late = self._busy > 0 and self.wait_seconds > 0
        while not self._waiting and not self._running and not (self._closed and not self._busy):
            self._condition.wait(WATCH_SECONDS)
            self.watch()
        self._waiting.sort(key=lambda entry: entry[:2])
        self._ready, self._waiting = [request for *_, request in self._waiting], []
