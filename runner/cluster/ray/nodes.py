"""The nodes of a run: one bundle and one agent each, waited for with a deadline, in a stable order, replaced when one is lost."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import runner
from runner.cluster.placement import NodePlace, placement
from runner.cluster.ray.agent import CALLS, NodeAgent
from runner.cluster.ray.here import NODE_RESOURCE
from runner.config.schema import Config
from runner.errors import Failure, UserError

SAY_SECONDS = 10.0
ANSWER_SECONDS = 60.0  # for an agent to answer
AGENT_SECONDS = 300.0  # ... and to start: its node may be busy, or its file system slow
NOTICE_SECONDS = 30.0  # until Ray itself knows that a node is dead
DOMAIN_LABEL = "domain"  # of a Ray node: racks or NVLink domains, whose nodes stay together


@dataclass
class Node:
    """A node of the run. `bundle`: its index in the placement group."""

    place: NodePlace
    bundle: int
    agent: Any
    where: dict[str, Any]
    clients: Any = None  # the actor that asks its servers, once there is one

    @property
    def who(self) -> str:
        return f"node {self.place.node} ({self.where['address']})"

    def ask(self, name: str, *args: Any, seconds: float = ANSWER_SECONDS) -> Any:
        """One call of the agent. Raises RayError when it is gone or silent."""
        return ray.get(getattr(self.agent, name).remote(*args), timeout=seconds)


class Nodes:
    """All of them; safe to ask from several threads."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self._lock = threading.RLock()
        self._places = list(placement(cfg).nodes)
        self._resource = "GPU" if cfg.parallelism.gpus + cfg.parallelism.rollout_gpus else NODE_RESOURCE
        bundles = [{self._resource: float(node.gpus or 1)} for node in self._places]
        self._group = placement_group(bundles, strategy="STRICT_SPREAD" if len(bundles) > 1 else "PACK")
        self._nodes: list[Node] = []
        try:
            self._wait(cfg.cluster.wait_seconds, lost=False)
            with ThreadPoolExecutor(len(self._places)) as threads:
                self._nodes = list(threads.map(self._occupy, self._places, self._order()))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._places)

    def all(self) -> list[Node]:
        """Every node, with a living agent: lost ones have been replaced by then. Raises Failure when none came for one in
        cluster.node_wait_seconds."""
        with self._lock:
            for index, node in enumerate(self._nodes):
                if not self._lives(node):
                    print(f"{node.who} was lost; waiting for a replacement", file=sys.stderr, flush=True)
                    self._nodes[index] = new = self._occupy(node.place, node.bundle, lost=True)
                    self._bring_weights(new)
            return list(self._nodes)

    def clients(self, node: Node) -> Any:
        """The actor that asks the servers of this node."""
        from runner.cluster.ray.clients import CALLS as REQUESTS
        from runner.cluster.ray.clients import EngineClient

        with self._lock:
            if node.clients is None:
                variables = {"PYTHONPATH": _python_path()}
                node.clients = self.actor(node, EngineClient, variables, max_concurrency=REQUESTS).remote(self.cfg.model)
            return node.clients

    def tell(self, name: str, *args: Any) -> None:
        """A call to every agent that still answers; nobody waits for a lost one."""
        with self._lock:
            asked = [getattr(node.agent, name).remote(*args) for node in self._nodes]
        ray.wait(asked, num_returns=len(asked), timeout=ANSWER_SECONDS)

    def actor(self, node: Node, kind: Any, variables: dict[str, str], **options: Any) -> Any:
        """A new actor of this class on the node, beside its agent."""
        return _actor(kind, self._group, node.bundle, variables, **options)

    def _bring_weights(self, new: Node) -> None:
        """Published weights from another node: servers of the new one start with them."""
        for source in self._nodes:
            if source is not new and self._lives(source):
                for file in source.ask("weight_files"):
                    new.ask("write_weights", file, source.agent.read_weights.remote(file), seconds=10 * ANSWER_SECONDS)
                return

    def _lives(self, node: Node) -> bool:
        try:
            node.ask("where")
        except RayError:
            return False
        return True

    def _occupy(self, place: NodePlace, bundle: int, *, lost: bool = False) -> Node:
        """An agent in the bundle, once it has a place. Of a lost node Ray says for up to 14 s that it is alive: an agent that was
        sent there is taken back when it is known to be dead."""
        devices = {"num_gpus": place.gpus} if self._resource == "GPU" else {"num_gpus": 0, "resources": {NODE_RESOURCE: 1}}
        variables = {"PYTHONPATH": _python_path()}
        deadline = time.monotonic() + self.cfg.cluster.node_wait_seconds
        while True:
            if lost:
                self._wait(max(0.0, deadline - time.monotonic()), lost=True)
            agent = _actor(NodeAgent, self._group, bundle, variables, max_concurrency=CALLS, **devices).remote(
                self.cfg, place.node, sum(engine.ranks for engine in place.engines)
            )
            answer, began = agent.where.remote(), time.monotonic()
            while not ray.wait([answer], timeout=1.0)[0] and self._ready() and time.monotonic() - began < AGENT_SECONDS:
                pass
            try:
                return Node(place, bundle, agent, ray.get(answer, timeout=0.0))
            except RayError as error:
                ray.kill(agent)
                if lost and time.monotonic() < deadline + NOTICE_SECONDS:
                    time.sleep(1.0)
                    continue
                if lost:
                    raise Failure(
                        f"node {place.node} was lost, and its agent does not start again: {error}", key="cluster"
                    ) from None
                fix = "runner must be installed on every node, in the environment that Ray was started in"
                raise UserError(f"node {place.node}: its agent does not start: {error}", key="cluster", fix=fix) from None

    def _wait(self, seconds: float, *, lost: bool) -> None:
        """Until the group has all of its bundles, with a line every ten seconds."""
        deadline = time.monotonic() + seconds
        said = time.monotonic()
        while not self._ready():
            now = time.monotonic()
            if now > deadline:
                problem = f"no room within {self.cfg.cluster.node_wait_seconds if lost else seconds:g} s: {self._room()}"
                key = "cluster.node_wait_seconds" if lost else "cluster.wait_seconds"
                if lost:
                    raise Failure(f"a node was lost, and there is {problem}", key=key)
                raise UserError(problem, key=key, fix=f"more nodes, a smaller parallelism, or a larger {key}")
            if now - said > SAY_SECONDS:
                said = now
                print(f"waiting for nodes: {self._room()}", file=sys.stderr, flush=True)
            time.sleep(0.2)

    def _ready(self) -> bool:
        table = placement_group_table(self._group)
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return table["state"] == "CREATED" and set(table["bundles_to_node_id"].values()) <= alive

    def _room(self) -> str:
        """What is there and what is missing, in words."""
        wanted = max(node.gpus or 1 for node in self._places)
        free: dict[str, float] = {}
        with contextlib.suppress(Exception):  # a private table; its absence must not end a run
            table = ray._private.state.available_resources_per_node()
            free = {node: resources.get(self._resource, 0) for node, resources in table.items()}
        alive = [node for node in ray.nodes() if node["Alive"]]
        having = [node for node in alive if node["Resources"].get(self._resource, 0) >= wanted]
        room = sum(free.get(node["NodeID"], 0) >= wanted for node in having)
        what = f"{wanted} GPUs" if self._resource == "GPU" else f"a `{NODE_RESOURCE}`"
        return f"{len(self)} nodes with {what} are needed; {len(alive)} are there, {len(having)} have that, {room} have it free"

    def _order(self) -> list[int]:
        """Bundles by domain and address: Ray's own order is arbitrary, and neighbours in rank should be neighbours."""
        there = {node["NodeID"]: node for node in ray.nodes()}
        nodes = placement_group_table(self._group)["bundles_to_node_id"]

        def key(bundle: int) -> tuple[Any, ...]:
            node = there[nodes[bundle]]
            address = tuple(int(part) if part.isdigit() else 0 for part in node["NodeManagerAddress"].split("."))
            return (node.get("Labels", {}).get(DOMAIN_LABEL, ""), address, node["NodeManagerPort"])

        return sorted(nodes, key=key)

    def close(self) -> None:
        """End every actor of this run, and leave the room to others. Safe to call again."""
        asked = []
        with contextlib.suppress(Exception):
            asked = [node.agent.close.remote() for node in self._nodes]
            ray.wait(asked, num_returns=len(asked), timeout=10.0)
        self._nodes = []
        with contextlib.suppress(Exception):
            remove_placement_group(self._group)


def _actor(kind: Any, group: Any, bundle: int, variables: dict[str, str], **options: Any) -> Any:
    settings = {"num_cpus": 0, "num_gpus": 0, "max_restarts": 0, "max_task_retries": 0, **options}
    strategy = PlacementGroupSchedulingStrategy(group, bundle)
    return ray.remote(kind).options(**settings, runtime_env={"env_vars": variables}, scheduling_strategy=strategy)


def _python_path() -> str:
    """This checkout first, where a node sees it at the same path; an installed runner otherwise."""
    import os

    root = str(Path(runner.__file__).parents[1])
    return os.pathsep.join(dict.fromkeys([root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
