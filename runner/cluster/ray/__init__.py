"""cluster=ray: nodes, ranks and servers under Ray. Nothing outside of this package imports Ray."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runner.cluster.launcher import EngineOrder, EngineProcess, Ranks
from runner.config.schema import Config
from runner.errors import UserErrors
from runner.weights.transports import kept_by_ranks, on_every_node

if TYPE_CHECKING:
    from runner.cluster.ray.connect import Connection
    from runner.cluster.ray.report import NodeReport


class RayLauncher:
    """See the protocol. Holds the nodes of one run from `__init__` to `close`."""

    def __init__(self, cfg: Config, connection: Connection | None = None, *, compare: bool = True) -> None:
        """Connects, unless there is a connection (which then stays), waits for the nodes and compares them: UserErrors with
        everything that differs."""
        from runner.cluster.ray.connect import Connection

        self.cfg = cfg
        self.publishes = on_every_node(cfg) or kept_by_ranks(cfg)
        self._own = connection is None
        self.connection = connection or Connection(cfg)
        try:
            from runner.cluster.ray.nodes import Nodes

            self.nodes = Nodes(cfg)
            print(self.connection.listening(), file=sys.stderr, flush=True)
            if compare:
                self._check()
        except BaseException:
            self.close()
            raise

    def host(self, cfg: Config) -> str:
        import ray

        from runner.rollout.sglang.interface import listen_address

        return listen_address(cfg.cluster, otherwise=ray.util.get_node_ip_address())

    def ranks(self, cfg: Config, run_dir: Path | None) -> Ranks:
        from runner.cluster.ray.ranks import RayRanks

        return RayRanks(cfg, self.nodes, run_dir)

    def engines(self, cfg: Config, orders: list[EngineOrder], scratch: Path) -> list[EngineProcess]:
        from runner.cluster.ray.engine import RemoteServer

        at: dict[int, list[tuple[int, int]]] = {}
        for node in self.nodes.all():
            for engine in node.place.engines:
                at.setdefault(engine.engine, []).append((node.place.node, engine.device))
        return [RemoteServer(self.nodes, at[order.index], order) for order in orders]

    def forget_weights(self, folders: list[str]) -> None:
        self.nodes.tell("forget_weights", folders)

    def reports(self) -> tuple[list[NodeReport], NodeReport, str]:
        """(what every node says of itself, what the driver says, the canary that all must have read)."""
        from runner.cluster.ray.report import report

        outputs = Path(self.cfg.outputs_dir).expanduser().absolute()
        outputs.mkdir(parents=True, exist_ok=True)
        canary = outputs / f".canary_{secrets.token_hex(4)}"
        text = secrets.token_hex(8)
        try:
            canary.write_text(text)
            import ray

            asked = [node.agent.report.remote(str(canary)) for node in self.nodes.all()]
            return ray.get(asked, timeout=120.0), report(self.cfg, self.host(self.cfg), None), text
        finally:
            canary.unlink(missing_ok=True)

    def _check(self) -> None:
        from runner.cluster.ray.report import problems, warnings

        nodes, driver, canary = self.reports()
        if found := list(problems(self.cfg, nodes, driver, canary)):
            raise UserErrors(found)
        for line in warnings(self.cfg, nodes):
            print(f"warning: {line}", file=sys.stderr)

    def close(self) -> None:
        """End this run's processes on every node; safe to call again."""
        if hasattr(self, "nodes"):
            self.nodes.close()
        if self._own:
            self.connection.close()
