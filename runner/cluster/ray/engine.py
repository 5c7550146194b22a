"""A server on another node, or on several, as the fleet holds it: started, watched and ended by those nodes' agents."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import aiohttp
import ray
from ray.exceptions import RayError

from runner.cluster.launcher import EngineOrder
from runner.cluster.ray.clients import RemoteClient
from runner.cluster.ray.nodes import Node, Nodes
from runner.rollout.sglang.client import Client
from runner.rollout.sglang.process import GRACE_SECONDS

START_SECONDS = 120.0  # for its process to exist, not to answer
WHY_SECONDS = 5.0


class RemoteServer:
    """See the protocol `EngineProcess`. A server of several nodes is a process on each; the first answers, and the end of one is
    the end of all."""

    def __init__(self, nodes: Nodes, places: list[tuple[int, int]], order: EngineOrder) -> None:
        """`places`: (node, first device there) of each part, the first rank's first."""
        self._nodes, self._places = nodes, places
        self.index, self.arguments, self.api_key, self.log = order.index, order.arguments, order.api_key, order.log
        several = "s" if len(places) > 1 else ""
        self.title = f"SGLang server {order.index} on node{several} {', '.join(str(node) for node, _ in places)}"
        self.url = ""
        self._on: list[Node] = []
        self._ended: list[Any] = []

    def start(self) -> None:
        """On its nodes, or on those that replaced them."""
        every = self._nodes.all()
        self._on, self._ended = [every[node] for node, _ in self._places], []
        try:
            urls = []
            for part, order in enumerate(self._orders()):
                urls.append(self._on[part].ask("start_server", order, self._places[part][1], seconds=START_SECONDS))
                self._ended.append(self._on[part].agent.server_ended.remote(self.index))
            self.url = urls[0]
        except RayError as error:
            raise OSError(f"{self.title}: {type(error).__name__}") from error

    def _orders(self) -> list[EngineOrder]:
        """What each part is told. They meet at a port of the first one's node."""
        log = Path(self.log).absolute()
        if len(self._on) == 1:
            return [EngineOrder(self.index, self.arguments, self.api_key, log)]
        meeting = f"{self._on[0].where['address']}:{self._on[0].ask('free_port')}"
        logs = [log, *(log.with_name(f"{log.stem}_part{part}{log.suffix}") for part in range(1, len(self._on)))]
        return [
            EngineOrder(self.index, {**self.arguments, "node_rank": part, "dist_init_addr": meeting}, self.api_key, own)
            for part, own in enumerate(logs)
        ]

    def client(self, session: aiohttp.ClientSession, api_key: str, *seconds: float) -> Client:
        """Requests that return routes go through an actor of its (first) node."""
        return RemoteClient(self._nodes.clients(self._on[0]), api_key, session, self.url, *seconds)

    def alive(self) -> bool:
        return bool(self._ended) and not ray.wait(self._ended, timeout=0)[0]

    def failure(self) -> str:
        if not self._ended:
            return "it was not started"
        try:
            first, _ = ray.wait(self._ended, timeout=WHY_SECONDS)
            if not first:
                return "it runs"
            why = str(ray.get(first[0]))
            return why if len(self._on) == 1 else f"its part on {self._on[self._ended.index(first[0])].who}: {why}"
        except RayError:
            return "its node, or the process that held it, was lost"

    def stop(self) -> None:
        """The first part is asked; the others, which SGLang does not let end when they are asked, are killed then."""
        self._end("stop_server")

    def kill(self) -> None:
        self._end("kill_server")

    def _end(self, how: str) -> None:
        for part, node in enumerate(self._on):
            with contextlib.suppress(RayError):  # the server ended with its node
                node.ask(how if part == 0 else "kill_server", self.index, seconds=2 * GRACE_SECONDS)
