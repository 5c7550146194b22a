"""What a run needs done on a node: one actor per node, which holds its GPUs, starts its servers, and says what the node has."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from runner import scratch
from runner.cluster.launcher import EngineOrder
from runner.cluster.ray.report import NodeReport, report
from runner.config.schema import Config
from runner.precision.plan import PrecisionPlan
from runner.rollout.sglang.interface import listen_address, name_of
from runner.weights.place import ROOT, shared_memory_folder

CALLS = 64  # at once: each server has one that waits for its end
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """With the raylet: what is inside a call would otherwise outlive a killed one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def weight_bytes(cfg: Config) -> int:
    """Of one whole copy in the rollout's format."""
    plan = PrecisionPlan.build(cfg.model, cfg.precision, "rollout")
    return sum(plan.tensors[name].stored_bytes(parameter.shape) for name, parameter in plan.parameters.items())


class NodeAgent:
    """Lives in a process of its own on the node; methods run on threads."""

    def __init__(self, cfg: Config, node: int, ranks: int) -> None:
        """`ranks`: of all servers of this node."""
        import ray

        die_with_parent()
        self.cfg, self.node, self.ranks = cfg, node, ranks
        self.address = listen_address(cfg.cluster, otherwise=ray.util.get_node_ip_address())
        self.scratch = scratch.make("runner-node-")
        self.weights = shared_memory_folder(weight_bytes(cfg))
        os.environ[ROOT] = str(self.weights)  # for the servers
        self._site: Any = None
        self._servers: dict[int, Any] = {}

    def where(self) -> dict[str, Any]:
        """What whoever starts processes here must know."""
        return {
            "address": self.address,
            "interface": name_of(self.address),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "scratch": str(self.scratch),
            "weights": str(self.weights),
            "pid": os.getpid(),
        }

    def report(self, canary: str | None) -> NodeReport:
        return report(self.cfg, self.address, Path(canary) if canary else None)

    def signal(self, pid: int, number: int) -> None:
        """To a rank of this run on this node."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def tail(self, log: str, lines: int) -> list[str]:
        try:
            return Path(log).read_text(errors="replace").splitlines()[-lines:]
        except OSError:
            return []

    def forget_weights(self, folders: list[str]) -> None:
        for folder in folders:
            shutil.rmtree(self.weights / folder, ignore_errors=True)

    def weight_files(self) -> list[str]:
        """Of every published set."""
        return [str(path.relative_to(self.weights)) for path in sorted(self.weights.rglob("*.safetensors"))]

    def read_weights(self, file: str) -> np.ndarray:
        return np.fromfile(self.weights / file, dtype=np.uint8)

    def write_weights(self, file: str, content: np.ndarray) -> None:
        path = self.weights / file
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        content.tofile(path)

    # servers

    def free_port(self) -> int:
        """Of this node's address, where the parts of a server of several nodes meet."""
        from runner.rollout.sglang.process import free_ports

        return free_ports(self.address, 1)[0]

    def start_server(self, order: EngineOrder, device: int) -> str:
        """Start it, with address and free ports of this node; returns its URL. One that runs already is killed first."""
        from runner.rollout.sglang.server import Site

        self.kill_server(order.index)
        if self._site is None:
            self._site = Site.here(self.cfg, self.scratch, ranks=self.ranks, host=self.address)
        server = self._servers[order.index] = self._site.server(order, device)
        server.start()
        return str(server.url)

    def server_ended(self, index: int) -> str:
        """Answers when its process has ended: why."""
        server = self._servers[index]
        while server.alive():
            time.sleep(0.1)
        return str(server.failure())

    def stop_server(self, index: int) -> None:
        if index in self._servers:
            self._servers[index].stop()

    def kill_server(self, index: int) -> None:
        if index in self._servers:
            self._servers[index].kill()

    def close(self) -> None:
        for server in self._servers.values():
            server.kill()
        scratch.remove(self.scratch)
        scratch.remove(self.weights)
