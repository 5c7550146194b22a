"""`python -m runner doctor cluster`: what every node has, what differs, and how fast they talk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from runner.config.choices import LauncherKind
from runner.config.schema import Config
from runner.errors import UserError
from runner.findings import Finding, Status

if TYPE_CHECKING:
    from runner.cluster.ray import RayLauncher
    from runner.cluster.ray.connect import Connection

GIB = 1024**3


def check_cluster(cfg: Config, connection: Connection | None = None) -> Iterator[Finding]:
    """A finding per node and per problem, and the rates where there is no problem. UserError for a cluster that is not there."""
    if cfg.cluster.launcher != LauncherKind.ray:
        raise UserError(f"cluster={cfg.cluster.name} has no nodes to ask", key="cluster", fix="cluster=ray")
    from runner.cluster.ray import RayLauncher

    launcher = RayLauncher(cfg, connection, compare=False)
    try:
        yield Finding("sockets", Status.ok, launcher.connection.listening())
        yield from _nodes(cfg, launcher)
    finally:
        launcher.close()


def _nodes(cfg: Config, launcher: RayLauncher) -> Iterator[Finding]:
    from runner.cluster.ray.rates import measure
    from runner.cluster.ray.report import problems, warnings

    nodes, driver, canary = launcher.reports()
    for index, node in enumerate(nodes):
        room = f"{node.memory_free / GIB:.0f} GiB of memory and {node.shm_free / GIB:.0f} GiB of /dev/shm free"
        found = f"{node.who}: {len(node.gpus)} GPUs, {room}, {node.open_files} open files, code {node.code}"
        yield Finding(f"node {index}", Status.ok, found)
    for line in warnings(cfg, nodes):
        yield Finding("limits", Status.warn, line)
    differences = list(problems(cfg, nodes, driver, canary))
    for problem in differences:
        yield Finding(problem.key or "cluster", Status.fail, problem.problem, problem.fix or "")
    if not differences:
        for name, rate in measure(launcher.nodes):
            yield Finding(name, Status.ok, rate)
