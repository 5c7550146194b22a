"""Weights by broadcast from the driver to processes on any host: one process group per session, buckets as plain bytes.

Both sides call `join` at the same time with the same address; rank 0 sends. NCCL between GPUs, gloo on CPUs. The group is made
anew for every session, so an engine that was started again needs no place in an old one.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from runner.weights.buckets import Piece, pack, unpack


@dataclass(frozen=True)
class Meeting:
    """Where a group meets: the store of rank 0 listens on host:port."""

    host: str
    port: int
    size: int
    backend: str  # gloo or nccl
    timeout_seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def join(meeting: Meeting, rank: int, host: str) -> Any:
    """The process group; blocks until all `size` ranks are there. Raises torch's DistError when they are not in time.

    `host` is the caller's own address, which gloo listens on for the other ranks. (NCCL asks NCCL_SOCKET_IFNAME.)
    """
    timeout = timedelta(seconds=meeting.timeout_seconds)
    store = open_store(meeting.host, meeting.port, meeting.size, rank == 0, timeout)
    prefixed = dist.PrefixStore("runner-weights", store)
    if meeting.backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(prefixed, rank, meeting.size, options)
    group: Any = dist.ProcessGroupGloo
    chosen = group._Options()
    chosen._timeout = timeout
    chosen._devices = [group.create_device(hostname=host)]
    return group(prefixed, rank, meeting.size, chosen)


def open_store(host: str, port: int, size: int, is_master: bool, timeout: timedelta) -> Any:
    """A TCPStore whose server listens on `host` alone; torch's own choice is every interface of the machine."""
    listener = None
    if is_master:
        opened = socket.create_server((host, port), backlog=max(128, size))
        listener = opened.detach()
    return dist.TCPStore(host, port, size, is_master, timeout, wait_for_workers=False, master_listen_fd=listener)


def send(group: Any, tensors: list[torch.Tensor], device: torch.device) -> int:
    """Broadcast one bucket from rank 0; returns its bytes."""
    flat = pack(tensors, device)
    _broadcast(group, flat)
    return flat.numel()


def receive(group: Any, pieces: list[Piece], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one bucket, in its order."""
    flat = torch.empty(sum(piece.bytes() for piece in pieces), dtype=torch.uint8, device=device)
    _broadcast(group, flat)
    yield from unpack(flat, pieces)


def _broadcast(group: Any, flat: torch.Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([flat], options).wait()
