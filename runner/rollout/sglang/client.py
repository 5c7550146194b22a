"""HTTP calls to one SGLang server, over one event loop. Everything a server can be asked is a method here."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp

from runner.config.choices import PauseMode

Reply = dict[str, Any]


CONTROL_SECONDS = 120.0  # for calls that neither generate nor move weights: a server that hangs must not hold up a sync
WEIGHTS, CACHES = ("weights",), ("kv_cache", "cuda_graph")  # SGLang's names of what its memory is for


class EngineFailure(Exception):
    """The server died, hung or answered something that it should not have; the request may be tried elsewhere."""


class Refused(Exception):
    """The server understood and said no; trying again gives the same answer."""


class Client:
    """`timeout_seconds` bounds a request for tokens, `load_seconds` one that moves weights; others end in CONTROL_SECONDS."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, api_key: str, timeout_seconds: float, load_seconds: float | None = None
    ) -> None:
        self._session, self.url, self._timeout = session, url, timeout_seconds
        self._load = load_seconds or timeout_seconds
        self._headers = {"Authorization": f"Bearer {api_key}"}

    async def generate(self, payload: Reply) -> Reply:
        """One request that does not stream; returns SGLang's answer. Cancelling aborts it in the server, too: the server
        notices that the connection closed."""
        reply: Reply = await self._call("/generate", payload, seconds=self._timeout)
        return reply

    async def ready(self, path: str = "/ready") -> bool:
        """False while it starts or when nobody listens."""
        try:
            async with self._session.get(self.url + path, timeout=aiohttp.ClientTimeout(total=5)) as reply:
                return reply.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def healthy(self, seconds: float) -> bool:
        """Whether the scheduler gave any sign of life: SGLang generates a token when nothing else runs."""
        try:
            async with self._session.get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(total=seconds)) as reply:
                return reply.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def abort_all(self) -> None:
        """Every request of this server ends at once, with what it has."""
        await self._call("/abort_request", {"abort_all": True})

    async def pause(self, mode: PauseMode) -> None:
        await self._call("/pause_generation", {"mode": mode.value})

    async def resume(self) -> None:
        await self._call("/continue_generation", {})

    async def release_memory(self) -> None:
        """Of a server that is paused and idle: SGLang's scheduler ends itself otherwise."""
        await self._call("/release_memory_occupation", {"tags": [*WEIGHTS, *CACHES]})

    async def take_memory(self, tags: tuple[str, ...]) -> None:
        """Each tag once after a release; what lies in it is undefined."""
        await self._call("/resume_memory_occupation", {"tags": list(tags)})

    async def begin_update(self, selector: str) -> None:
        """`selector`: all, or target where a draft model is not updated: what is restored for loading must be loaded."""
        await self._call("/begin_weight_update", {"selector": selector}, seconds=self._load)

    async def end_update(self) -> None:
        await self._call("/end_weight_update", {}, seconds=self._load)

    async def plugin(self, action: str, *, flush: bool = False, version: str | None = None, **request: Any) -> Reply:
        """Ask runner's plugin (plugin/weights.py). Its answer has `problems`; a server that never heard of it raises Refused."""
        body: Reply = {
            "zmq_handles": {"runner": json.dumps({"action": action, **request})},
            "flush_cache": flush,
        }
        if version is not None:
            body["weight_version"] = version
        reply = await self._call("/update_weights_from_ipc", body, refusals=False, seconds=self._load)
        try:
            answer: Reply = json.JSONDecoder().raw_decode(reply["message"])[0]
        except ValueError:
            raise Refused(f"{action}: {reply['message']}") from None
        if not reply["success"] and not answer["problems"]:  # for example a flush that was refused
            answer["problems"] = [f"{action}: {reply['message']}"]
        return answer

    async def post(self, path: str, body: Reply) -> Reply:
        reply: Reply = await self._call(path, body)
        return reply

    async def get(self, path: str) -> Reply:
        reply: Reply = await self._call(path, None)
        return reply

    async def delete(self, path: str) -> None:
        await self._call(path, None, method="DELETE")

    async def _call(
        self, path: str, body: Reply | None, *, refusals: bool = True, method: str = "", seconds: float | None = None
    ) -> Any:
        method = method or ("POST" if body is not None else "GET")
        seconds = seconds or min(self._timeout, CONTROL_SECONDS)
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.request(
                method, self.url + path, json=body, headers=self._headers, timeout=timeout
            ) as response:
                text = await response.text()
        except TimeoutError:
            raise EngineFailure(f"{path} did not answer within {seconds:.0f} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise EngineFailure(f"{path}: {type(error).__name__}: {error}") from None
        if response.status >= 500:
            raise EngineFailure(f"{path} answered {response.status}: {text[:300]}")
        if response.status >= 400 and refusals:
            raise Refused(f"{path} answered {response.status}: {text[:500]}")
        try:
            return json.loads(text) if text else {}
        except ValueError:
            return {"message": text}


async def wait_until_ready(client: Client, alive: Any, seconds: float) -> bool:
    """Polls until the server answers, ends, or the time is over."""
    deadline = asyncio.get_running_loop().time() + seconds
    while alive() and asyncio.get_running_loop().time() < deadline:
        if await client.ready():
            return True
        await asyncio.sleep(0.1)
    return False
