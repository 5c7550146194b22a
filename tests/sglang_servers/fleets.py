"""A fleet of engines that only pretend. Starts no server."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cases import requests

pytest.importorskip("aiohttp", reason="make setup-sglang")

import aiohttp

from runner.config.choices import PauseMode
from runner.rollout.sglang.client import Client
from runner.rollout.sglang.decoding import Generation
from runner.rollout.sglang.engines import Settings
from runner.rollout.sglang.fleet import Fleet
from runner.weights.transports import Driver
from runner.weights.transports.files import FilesDriver

SETTINGS = Settings(
    startup_seconds=1, request_seconds=1, health_seconds=0, max_retries=2, pause_mode=PauseMode.abort, repacks=False,
    draft=frozenset(),
)  # fmt: skip
FILES = FilesDriver("tensor", None)  # type: ignore[arg-type]  # nothing is written here


class FakeServer:
    """Lives until `dead`."""

    def __init__(self, index: int) -> None:
        self.index, self.url, self.dead, self.log = index, f"engine {index}", False, Path("log")
        self.arguments = {"tp_size": 1}

    def client(self, session: aiohttp.ClientSession, api_key: str, *seconds: float) -> Client:
        return Client(session, self.url, api_key, *seconds)

    def alive(self) -> bool:
        return not self.dead

    def kill(self) -> None:
        """A process that is started again is another one."""


class FakeClient:
    """Records what it is asked. `answers` are given in turn to generate; an exception is raised, the last one stays."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.bodies, self.calls = list(answers), list[Any](), list[Any]()

    async def generate(self, body: dict[str, Any]) -> Any:
        self.bodies.append(body)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def plugin(self, action: str, **request: Any) -> dict[str, Any]:
        self.calls.append((action, request))
        return {"problems": [], "arrived": len(request.get("digests", [])), "checked": len(request.get("parts", []))}

    def __getattr__(self, name: str) -> Callable[..., Awaitable[None]]:
        async def record(*given: Any) -> None:
            self.calls.append((name, *given))

        return record


def reply(tokens: list[int], reason: str = "length", version: str = "3.1") -> dict[str, Any]:
    meta = {
        "finish_reason": {"type": reason},
        "output_token_logprobs": [(-0.5, token, None) for token in tokens],
        "weight_version": version,
    }
    return {"output_ids": tokens, "meta_info": meta}


def ready_fleet(*clients: FakeClient, driver: Driver = FILES, **settings: Any) -> Fleet:
    servers: Any = [FakeServer(i) for i in range(len(clients))]
    found = Fleet(servers, "key", dataclasses.replace(SETTINGS, **settings), driver)
    found.roster.updates = 1
    for engine, client in zip(found.roster.engines, clients, strict=True):
        engine.client, engine.up, engine.synced = client, True, 1  # type: ignore[assignment]
    return found


def generation(prompt: str = "p", prompt_tokens: int = 8, room: int = 4) -> Generation:
    request = dataclasses.replace(requests(1, max_response_tokens=room)[0], prompt_id=prompt, tokens=(5,) * prompt_tokens)
    return Generation(request, 256, None, prompt)


async def chosen(fleet: Fleet, what: Generation) -> int:
    """The engine that gets it; its tokens then are outstanding there."""
    engine = await fleet.dispatch._pick(what)
    engine.outstanding += what.outstanding
    return fleet.roster.engines.index(engine)  # type: ignore[arg-type]


WEIGHTS = {"digests": {"a": "x"}, "parts": {"a": ["a"]}, "formats": {"a": "bf16"}}
