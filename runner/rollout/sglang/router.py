"""sglang-router in front of the engines (rollout.use_router): it chooses who generates; all else goes to engines directly.

What sglang-router 0.3.2 does not pass on: recorded routes, pauses, weight updates and aborts. Engines are its workers only while
they have the current weights, so a request cannot reach one that was started again and has none yet.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import aiohttp

from runner.errors import UserError
from runner.rollout.sglang.client import Client, EngineFailure, Refused
from runner.rollout.sglang.interface import LOOPBACK
from runner.rollout.sglang.process import PORT_TAKEN, Child, free_ports, start_problem

START_SECONDS = 60.0
REGISTER_SECONDS = 30.0  # for the router to take a worker in or out: it asks the engine about itself first
POLL_SECONDS = 0.05


class RouterProcess(Child):
    module = "runner.rollout.sglang.router_entry"
    title = "sglang-router"

    def __init__(self, arguments: dict[str, Any], *, host: str, api_key: str, log: Path) -> None:
        super().__init__(host=host, api_key=api_key, log=log)
        self.arguments = arguments

    def start(self) -> None:
        (self.port,) = free_ports(self.host, 1)
        (metrics,) = free_ports(LOOPBACK, 1)  # they come without a key
        ports = {"host": self.host, "port": self.port, "prometheus_host": LOOPBACK, "prometheus_port": metrics}
        self.launch({"router_args": {**self.arguments, **ports}})


class Router:
    """The process, its client, and the engines that it knows. `outstanding`: tokens of the requests that went through it."""

    def __init__(self, process: RouterProcess, api_key: str, request_seconds: float) -> None:
        self.process = process
        self.client: Client | None = None
        self.outstanding = 0
        self.up = False
        self.restarting: asyncio.Task[None] | None = None
        self.broken: UserError | None = None
        self._api_key, self._request_seconds = api_key, request_seconds
        self._registering = asyncio.Lock()

    async def start(self, session: aiohttp.ClientSession) -> None:
        """UserError when it does not come up."""
        for _ in range(3):  # another program may take the port first
            self.process.start()
            self.client = Client(session, self.process.url, self._api_key, self._request_seconds)
            deadline = asyncio.get_running_loop().time() + START_SECONDS
            while self.process.alive() and asyncio.get_running_loop().time() < deadline:
                if await self.client.ready("/liveness"):
                    self.up = True
                    return
                await asyncio.sleep(POLL_SECONDS)
            problem = start_problem(self.process, START_SECONDS)
            self.process.kill()
            if PORT_TAKEN not in problem.problem:
                break
        raise problem

    async def register(self, urls: set[str]) -> None:
        """Make exactly these engines its workers. UserError when it does not follow; EngineFailure when it died."""
        async with self._registering:
            deadline = asyncio.get_running_loop().time() + REGISTER_SECONDS
            asked: set[str] = set()
            while True:
                known = await self._workers()
                healthy = {url for url, worker in known.items() if worker["is_healthy"]}
                if known.keys() == urls == healthy:
                    return
                if asyncio.get_running_loop().time() > deadline:
                    raise UserError(
                        f"sglang-router has {sorted(healthy)} as its workers, {sorted(urls)} were asked for",
                        key="rollout.use_router",
                        fix=f"look at {self.process.log}",
                    )
                for url in (urls - known.keys()) - asked:
                    await self._http.post("/workers", {"url": url, "api_key": self._api_key})
                for url in known.keys() - urls - asked:
                    await self._http.delete(f"/workers/{known[url]['id']}")
                asked |= urls | known.keys()
                await asyncio.sleep(POLL_SECONDS)

    async def drop(self, url: str) -> None:
        """Send nothing to this engine any more, if the router knows it and still lives."""
        with contextlib.suppress(EngineFailure, Refused):
            if worker := (await self._workers()).get(url):
                await self._http.delete(f"/workers/{worker['id']}")

    @property
    def _http(self) -> Client:
        assert self.client is not None
        return self.client

    async def _workers(self) -> dict[str, dict[str, Any]]:
        return {worker["url"]: worker for worker in (await self._http.get("/workers"))["workers"]}


def router_arguments(request_seconds: float) -> dict[str, Any]:
    """Options of sglang-router's RouterArgs. The pool retries by itself, and finds engines that hang."""
    return {
        "policy": "cache_aware",  # the engine that has most of a prompt cached, unless the load is uneven
        "disable_retries": True,
        "disable_circuit_breaker": True,
        "health_check_endpoint": "/ready",  # /health generates a token, which a paused engine does not
        "request_timeout_secs": max(1, round(request_seconds)),
        "shutdown_grace_period_secs": 1,
        "worker_startup_check_interval": 1,
        "log_level": "warn",
    }
