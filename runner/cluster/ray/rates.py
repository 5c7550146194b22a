"""How fast the nodes of a cluster talk: object store, all-reduce, and on GPUs the way from device to host."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import ray

from runner.cluster.ray.agent import die_with_parent
from runner.cluster.ray.nodes import Node, Nodes

GIB = 1024**3
PROBE_BYTES = 64 << 20
ROUNDS = 5  # after one that is not counted
SECONDS = 120.0  # for a probe to answer


class Probe:
    """A process of its own on a node, with the node's first device where there is one."""

    def __init__(self) -> None:
        die_with_parent()

    def free_port(self, address: str) -> int:
        with socket.socket() as opened:
            opened.bind((address, 0))
            return int(opened.getsockname()[1])

    def put(self) -> list[Any]:
        return [ray.put(np.ones(PROBE_BYTES, dtype=np.uint8))]

    def take(self, held: list[Any]) -> float:
        """Seconds until the object is in this node's store."""
        began = time.perf_counter()
        ray.get(held[0])
        return time.perf_counter() - began

    def join(self, rendezvous: str, rank: int, world: int) -> None:
        import torch
        import torch.distributed as dist

        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        limit = timedelta(seconds=SECONDS)
        dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world, timeout=limit)

    def all_reduce(self) -> float:
        """Seconds of one sum of PROBE_BYTES over all nodes; its values are checked."""
        import torch
        import torch.distributed as dist

        took = []
        for _ in range(1 + ROUNDS):
            data = torch.ones(PROBE_BYTES // 4, device=self.device)
            self._settle()
            began = time.perf_counter()
            dist.all_reduce(data)
            self._settle()
            took.append(time.perf_counter() - began)
            assert bool((data == dist.get_world_size()).all()), "an all-reduce gave a wrong sum"
        return sum(took[1:]) / ROUNDS

    def to_host(self) -> float | None:
        """Seconds of a copy of PROBE_BYTES from device to pinned host memory; None on a CPU."""
        import torch

        if self.device.type != "cuda":
            return None
        source = torch.ones(PROBE_BYTES, dtype=torch.uint8, device=self.device)
        target = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
        target.copy_(source)
        self._settle()
        began = time.perf_counter()
        for _ in range(ROUNDS):
            target.copy_(source)
        self._settle()
        return (time.perf_counter() - began) / ROUNDS

    def _settle(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(nodes: Nodes) -> Iterator[tuple[str, str]]:
    """(what, its rate in words). Raises RayError where a node does not answer in time."""
    there = nodes.all()
    probes = [nodes.actor(node, Probe, _variables(node)).remote() for node in there]
    try:
        for index in range(1, len(probes)):
            held = ray.get(probes[index - 1].put.remote(), timeout=SECONDS)
            seconds = ray.get(probes[index].take.remote(held), timeout=SECONDS)
            yield "object store", f"{there[index - 1].who} to {there[index].who}: {PROBE_BYTES / GIB / seconds:.2f} GiB/s"
        address = there[0].where["address"]
        rendezvous = f"tcp://{address}:{ray.get(probes[0].free_port.remote(address), timeout=SECONDS)}"
        joins = [probe.join.remote(rendezvous, rank, len(probes)) for rank, probe in enumerate(probes)]
        ray.get(joins, timeout=SECONDS)
        slowest = max(ray.get([probe.all_reduce.remote() for probe in probes], timeout=SECONDS))
        yield "all-reduce", f"{PROBE_BYTES >> 20} MiB over {len(probes)} nodes, a device each: {1000 * slowest:.1f} ms"
        for node, seconds in zip(there, ray.get([probe.to_host.remote() for probe in probes], timeout=SECONDS), strict=True):
            if seconds is not None:
                yield "device to host", f"{node.who}: {PROBE_BYTES / GIB / seconds:.1f} GiB/s"
    finally:
        for probe in probes:
            ray.kill(probe)


def _variables(node: Node) -> dict[str, str]:
    found = {"GLOO_SOCKET_IFNAME": node.where["interface"], "NCCL_SOCKET_IFNAME": node.where["interface"]}
    if node.where["visible"]:
        found |= {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": node.where["visible"]}
    return found
