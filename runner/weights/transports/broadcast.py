"""Weights by broadcast from the driver to processes on any host: one process group per session, buckets as plain bytes.

Both sides call `join` at the same time with the same address; rank 0 sends. NCCL between GPUs, gloo on CPUs. The group is made
anew for every session, so an engine that was started again needs no place in an old one.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from runner.errors import UserError
from runner.weights.buckets import Piece, describe, pack, unpack
from runner.weights.transports.base import (
    KEY,
    Ask,
    Offer,
    Rank,
    Site,
    Transport,
    WritesSets,
    in_shared_memory,
    register,
)

if TYPE_CHECKING:
    import torch

    from runner.config.schema import Config
    from runner.weights.weight_set import WeightSet

T = TypeVar("T")
TIMEOUT_SECONDS = 120.0  # for engines to come to the meeting, and for each bucket
BUCKET_BYTES = 1 << 30
_for_the_draft: list[tuple[str, torch.Tensor]] = []  # what only the target can receive, until the draft takes it


class Distributed(Transport):
    name = "distributed"

    def traffic(self, stream: int, engines: int, ranks: int) -> tuple[int, str]:
        return stream * ranks, f"broadcast: every one of {ranks} engine GPUs receives every tensor"

    def problems(self, cfg: Config) -> Iterator[UserError]:
        yield from apart(cfg)

    def driver(self, site: Site) -> BroadcastDriver:
        return BroadcastDriver(site)

    def receive(self, offer: Offer, rank: Rank, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        def arriving() -> Iterator[tuple[str, torch.Tensor]]:
            group = join(Meeting(**offer["meeting"]), offer["rank"] + rank.rank, rank.host)
            for bucket in offer["buckets"]:
                yield from receive(group, [Piece(**piece) for piece in bucket], rank.device)

        yield from for_target_and_draft(arriving, rank, wanted)


def apart(cfg: Config) -> Iterator[UserError]:
    """What NCCL refuses."""
    if cfg.parallelism.colocate and cfg.parallelism.rollout_gpus:
        yield UserError(
            "NCCL cannot broadcast between two processes on one GPU, and trainer and engines share theirs",
            key=KEY,
            fix=f"{KEY}=tensor, or parallelism.colocate=false",
        )


def for_target_and_draft(
    arriving: Callable[[], Iterator[tuple[str, torch.Tensor]]], rank: Rank, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What is wanted of what arrives, which it does once: the target keeps for the draft what it does not want itself."""
    if rank.is_draft:
        while _for_the_draft:
            item = _for_the_draft.pop(0)
            if wanted(item[0]):
                yield item
        return
    _for_the_draft.clear()
    for item in arriving():
        if wanted(item[0]):
            yield item
        else:
            _for_the_draft.append(item)


class BroadcastDriver(WritesSets):
    """Its sets in shared memory also serve engines that start again."""

    transport = Distributed.name

    def __init__(self, site: Site) -> None:
        super().__init__(in_shared_memory(site))
        self._host, self._backend = site.host, "nccl" if site.on_gpus else "gloo"
        if site.on_gpus:
            os.environ["NCCL_SOCKET_IFNAME"] = site.interface  # NCCL takes no address

    async def carry(self, weights: WeightSet, names: list[str], engines: int, ranks: int, ask: Ask) -> str:
        try:
            sender = Sender(self._backend, self._host, 1 + ranks * engines, weights, names)
        except OSError as error:
            return f"broadcast: {error}"
        described, meeting = sender.described(), sender.meeting.as_dict()
        sending = sender.start()
        whole = await ask(lambda place: {"meeting": meeting, "rank": 1 + ranks * place, "buckets": described})
        if not whole and not sending.done():
            return ""  # an engine refused or died before the meeting: nobody will come, and the reason is known
        return await asyncio.wrap_future(sending)


class Sender:
    """Rank 0 of one meeting: reads the named parts of a set and broadcasts them, a bucket at a time."""

    def __init__(
        self, backend: str, host: str, size: int, weights: WeightSet, names: list[str], bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        """`host`: this machine's address that the meeting listens on, from now on. OSError where it cannot."""
        self._listener = socket.create_server((host, 0), backlog=max(128, size))
        port = self._listener.getsockname()[1]
        self.meeting = Meeting(host, port, size, backend, TIMEOUT_SECONDS)
        self._weights, self._buckets = weights, divided(weights, names, bucket_bytes)

    def described(self) -> list[list[dict[str, Any]]]:
        """What the receivers must know, as JSON."""
        return [[vars(piece) for piece in bucket] for bucket in self._buckets]

    def start(self) -> Future[str]:
        """`run` in a thread of its own."""
        return in_daemon("weight-sender", self.run)

    def run(self) -> str:
        """Blocks until everything is sent; "" or what went wrong (an engine that did not come, or died on the way)."""
        import torch

        from runner.weights.weight_set import read_parts

        device = torch.device("cuda" if self.meeting.backend == "nccl" else "cpu")
        try:
            group = join(self.meeting, 0, self.meeting.host, self._listener)
            for bucket in self._buckets:
                send(group, [tensor for _, tensor in read_parts(self._weights, [piece.name for piece in bucket])], device)
        except (RuntimeError, OSError) as error:  # torch.distributed's errors
            return f"broadcast: {(str(error).splitlines() or [type(error).__name__])[0]}"
        return ""


def divided(weights: WeightSet, names: list[str], bucket_bytes: int) -> list[list[Piece]]:
    """The named parts of a set in buckets, each ended by the part that fills it."""
    from runner.weights.weight_set import read_parts

    buckets: list[list[Piece]] = []
    size = 0
    for name, tensor in read_parts(weights, names):
        (piece,) = describe([(name, tensor)])
        if not buckets or size >= bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(piece)
        size += piece.bytes()
    return buckets


def in_daemon(name: str, work: Callable[[], T]) -> Future[T]:
    """The result of a thread that is a daemon: a meeting that nobody comes to must not hold up the end of the program."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return result


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


def join(meeting: Meeting, rank: int, host: str, listener: socket.socket | None = None) -> Any:
    """The process group; blocks until all `size` ranks are there. Raises torch's DistError when they are not in time.

    `host` is the caller's own address, which gloo listens on for the other ranks. (NCCL asks NCCL_SOCKET_IFNAME.) `listener`:
    rank 0's, at the meeting's address; its store takes it over.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    if rank == 0 and listener is None:
        listener = socket.create_server((meeting.host, meeting.port), backlog=max(128, meeting.size))
    return group_over(PrefixStore("runner-weights", store_of(meeting, listener)), meeting, rank, host)


def group_over(store: Any, meeting: Meeting, rank: int, host: str | None) -> Any:
    """The process group of those who meet in this store. `host`: see `join`; None: gloo takes the interface that the environment
    names."""
    import torch.distributed as dist

    timeout = timedelta(seconds=meeting.timeout_seconds)
    if meeting.backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, meeting.size, options)
    group: Any = dist.ProcessGroupGloo
    chosen = group._Options()
    chosen._timeout = timeout
    at = {"interface": os.environ["GLOO_SOCKET_IFNAME"]} if host is None else {"hostname": host}
    chosen._devices = [group.create_device(**at)]
    return group(store, rank, meeting.size, chosen)


def store_of(meeting: Meeting, listener: socket.socket | None = None) -> Any:
    """The store where it meets. With `listener`, which it takes over, its server."""
    timeout = timedelta(seconds=meeting.timeout_seconds)
    return open_store(meeting.host, meeting.port, meeting.size, listener is not None, timeout, listener)


def open_store(
    host: str, port: int, size: int, is_master: bool, timeout: timedelta, listener: socket.socket | None = None
) -> Any:
    """A TCPStore whose server listens on `host` alone; torch's own choice is every interface of the machine."""
    from torch._C._distributed_c10d import TCPStore

    if is_master and listener is None:
        listener = socket.create_server((host, port), backlog=max(128, size))
    handle = listener.detach() if listener is not None else None
    return TCPStore(host, port, size, is_master, timeout, wait_for_workers=False, master_listen_fd=handle)


def send(group: Any, tensors: list[torch.Tensor], device: torch.device) -> int:
    """Broadcast one bucket from rank 0; returns its bytes."""
    flat = pack(tensors, device)
    _broadcast(group, flat)
    return flat.numel()


def receive(group: Any, pieces: list[Piece], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one bucket, in its order."""
    import torch

    flat = torch.empty(sum(piece.bytes() for piece in pieces), dtype=torch.uint8, device=device)
    _broadcast(group, flat)
    yield from unpack(flat, pieces)


def _broadcast(group: Any, flat: torch.Tensor) -> None:
    import torch.distributed as dist

    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([flat], options).wait()


register(Distributed())
