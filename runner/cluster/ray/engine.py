"""A server on another node, as the fleet holds it: started, watched and ended by that node's agent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import ray
from ray.exceptions import GetTimeoutError, RayError

from runner.cluster.launcher import EngineOrder
from runner.cluster.ray.clients import RemoteClient
from runner.cluster.ray.nodes import Node, Nodes
from runner.rollout.sglang.client import Client
from runner.rollout.sglang.process import GRACE_SECONDS

START_SECONDS = 120.0  # for its process to exist, not to answer
WHY_SECONDS = 5.0


class RemoteServer:
    """See the protocol `EngineProcess`."""

    def __init__(self, nodes: Nodes, node: int, device: int, order: EngineOrder) -> None:
        self._nodes, self._node, self._device = nodes, node, device
        self.index, self.arguments, self.api_key, self.log = order.index, order.arguments, order.api_key, order.log
        self.title = f"SGLang server {order.index} on node {node}"
        self.url = ""
        self._on: Node | None = None
        self._ended: Any = None

    def start(self) -> None:
        """On its node, or on the one that replaced it."""
        order = EngineOrder(self.index, self.arguments, self.api_key, Path(self.log).absolute())
        self._on = self._nodes.all()[self._node]
        try:
            self.url = self._on.ask("start_server", order, self._device, seconds=START_SECONDS)
        except RayError as error:
            raise OSError(f"{self.title}: {type(error).__name__}") from error
        self._ended = self._on.agent.server_ended.remote(self.index)

    def client(self, session: aiohttp.ClientSession, api_key: str, *seconds: float) -> Client:
        """Requests that return routes go through an actor of its node."""
        assert self._on is not None
        return RemoteClient(self._nodes.clients(self._on), api_key, session, self.url, *seconds)

    def alive(self) -> bool:
        return self._ended is not None and not ray.wait([self._ended], timeout=0)[0]

    def failure(self) -> str:
        if self._ended is None:
            return "it was not started"
        try:
            return str(ray.get(self._ended, timeout=WHY_SECONDS))
        except GetTimeoutError:
            return "it runs"
        except RayError:
            return "its node, or the process that held it, was lost"

    def stop(self) -> None:
        self._end("stop_server")

    def kill(self) -> None:
        self._end("kill_server")

    def _end(self, how: str) -> None:
        if self._on is None:
            return
        try:
            self._on.ask(how, self.index, seconds=2 * GRACE_SECONDS)
        except RayError:  # the server ended with it
            self._on = None
