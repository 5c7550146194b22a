"""Who asks the servers of a node for tokens: an actor there. Routes stay on the node; the driver gets the rest, and a reference.

The reply of a sample of 32K tokens of a model with 60 layers and 8 experts per token is 80 MiB of JSON and two seconds of a core:
thousands of them are not for one process.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import ray
from ray.exceptions import RayError

from runner.cluster.ray.agent import die_with_parent
from runner.config.schema import ModelConfig
from runner.rollout.sglang.client import Client, EngineFailure, Refused, Reply
from runner.rollout.sglang.decoding import RouteDecoder
from runner.routing.reference import Part, RouteRef
from runner.routing.routes import RouteError, check_rows

ROUTES = "routed_experts"  # SGLang's name of them in a reply
CALLS = 4096  # requests at once
FETCH_SECONDS = 600.0  # for routes to come from another node
KINDS: dict[str, type[Exception]] = {"failure": EngineFailure, "refused": Refused, "routes": RouteError}


@dataclass(frozen=True)
class Stored:
    """Compact routes in an object store: `runner.routing.reference.Held`."""

    reference: Any

    def array(self) -> np.ndarray:
        """Memory of this node's store, shared with whoever reads it here."""
        found: np.ndarray = ray.get(self.reference, timeout=FETCH_SECONDS)
        return found


class EngineClient:
    """The actor: requests of all servers of its node, many at a time."""

    def __init__(self, model: ModelConfig) -> None:
        die_with_parent()
        self.decoder = RouteDecoder(model)
        self._session: aiohttp.ClientSession | None = None

    async def generate(self, url: str, api_key: str, payload: Reply, seconds: float) -> tuple[Reply, np.ndarray]:
        """(SGLang's reply without routes, their compact form); a reply with `problem` where there is none."""
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60))
        try:
            reply = await Client(self._session, url, api_key, seconds).generate(payload)
            encoded = reply["meta_info"].pop(ROUTES, None)
            new = len(reply["output_ids"])
            if encoded is None or not new:
                return reply, np.empty(0, dtype=np.uint8)
            rows = len(payload["input_ids"]) + new - 1 - payload["routed_experts_start_len"]
            routes = await asyncio.to_thread(self._decoded, encoded, rows, f"request {payload['rid']}")
            reply["meta_info"]["route_rows"] = rows
            return reply, routes
        except tuple(KINDS.values()) as error:
            kind = next(name for name, known in KINDS.items() if isinstance(error, known))
            return {"problem": str(error), "kind": kind}, np.empty(0, dtype=np.uint8)

    def _decoded(self, encoded: str, rows: int, where: str) -> np.ndarray:
        routes = self.decoder.decode(encoded, rows, where)
        check_rows(routes, self.decoder.num_experts, where)
        return routes.numpy()


class RemoteClient(Client):
    """A server's client in the driver, whose requests for tokens that return routes go through the node's actor."""

    def __init__(self, actor: Any, api_key: str, *rest: Any) -> None:
        super().__init__(rest[0], rest[1], api_key, *rest[2:])
        self._actor, self._key = actor, api_key

    async def generate(self, payload: Reply) -> Reply:
        """As in the base class; a cancelled request is aborted by its rid."""
        if not payload.get("return_routed_experts"):
            return await super().generate(payload)
        answer = self._actor.generate.options(num_returns=2).remote(self.url, self._key, payload, self._timeout)
        try:
            reply: Reply = await answer[0]
        except RayError as error:
            raise EngineFailure(f"/generate: its node, or who asks there, was lost: {type(error).__name__}") from None
        if "problem" in reply:
            raise KINDS[reply["kind"]](reply["problem"])
        if "route_rows" in reply["meta_info"]:
            reply["meta_info"][ROUTES] = RouteRef((Part(Stored(answer[1]), reply["meta_info"]["route_rows"]),))
        return reply
