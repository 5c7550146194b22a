"""Weights from the trainer's ranks to engines with GPUs of their own, without the driver: NCCL between GPUs, gloo on CPUs.

Under cluster=ray every rank writes what it owns into its node's memory once per version and hashes it there. A session has a
sender for every rank that owns something of what is asked for (several where there are pipeline stages or expert shards): it
makes a group with all ranks of the engines. Senders come one after the other: a receiver takes part in one broadcast at a time.
They meet at a store in the driver, which sees names and hashes alone. An engine that starts again while ranks compute waits until
they have finished: only then is it asked.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from runner.config.choices import LauncherKind
from runner.config.option import trainer_layout
from runner.errors import UserError
from runner.weights.buckets import Piece
from runner.weights.transports.base import KEY, Ask, Offer, Rank, Site, Transport, register
from runner.weights.transports.broadcast import (
    BUCKET_BYTES,
    TIMEOUT_SECONDS,
    Meeting,
    apart,
    divided,
    for_target_and_draft,
    group_over,
    in_daemon,
    receive,
    send,
    store_of,
)

if TYPE_CHECKING:
    import torch

    from runner.config.schema import Config
    from runner.data import ExportedTensor
    from runner.weights.published import PublishedSet, PublishedTensor
    from runner.weights.stream import SealedTensor
    from runner.weights.weight_set import WeightSet

READY_POLL_SECONDS = 0.02
DESCRIBED, NOTHING = "pieces", b"[]"  # what a sender says of its buckets, in its part of the store; of none: it cannot


class FromRanks(Transport):
    name = "ranks"
    kept_by_ranks = True

    def traffic(self, stream: int, engines: int, ranks: int) -> tuple[int, str]:
        return stream * ranks, f"broadcast by the ranks that own them: every one of {ranks} engine GPUs receives every tensor"

    def problems(self, cfg: Config) -> Iterator[UserError]:
        yield from apart(cfg)
        if cfg.cluster.launcher == LauncherKind.local or trainer_layout(cfg).in_process:
            yield UserError(
                f"weight_transport={self.name} has the processes of a trainer send, which agents of a cluster bring together",
                key=KEY,
                fix=f"cluster=ray trainer=megatron, or {KEY}=distributed",
            )

    def driver(self, site: Site) -> RanksDriver:
        return RanksDriver(site)

    def receive(self, offer: Offer, rank: Rank, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        yield from for_target_and_draft(lambda: _arriving(offer, rank), rank, wanted)


@dataclass(frozen=True)
class Order:
    """What one rank is to send: part name -> file, below the folder of its node's published weights."""

    meeting: Meeting
    sender: int
    location: dict[str, str]


class RanksDriver:
    """Tells ranks and engines where they meet."""

    transport = FromRanks.name

    def __init__(self, site: Site) -> None:
        self._host, self._backend = site.host, "nccl" if site.on_gpus else "gloo"

    def write(self, version: int, stream: Iterable[ExportedTensor | SealedTensor], previous: WeightSet | None) -> WeightSet:
        """Ranks have written it."""
        from runner.weights.published import collect

        return collect(version, cast("Iterable[PublishedTensor]", stream))

    async def carry(self, weights: WeightSet, names: list[str], engines: int, ranks: int, ask: Ask) -> str:
        published = cast("PublishedSet", weights)
        size = 1 + ranks * engines
        try:
            listener = socket.create_server((self._host, 0), backlog=max(128, size))
        except OSError as error:
            return f"broadcast: {error}"
        meeting = Meeting(self._host, listener.getsockname()[1], size, self._backend, TIMEOUT_SECONDS)
        store = store_of(meeting, listener)
        owned: dict[int, dict[str, str]] = {}
        for name in names:
            owned.setdefault(published.owners[name], {})[name] = str(published.location[name])
        orders = {sender: Order(meeting, sender, location) for sender, location in owned.items()}
        sending = asyncio.wrap_future(in_daemon("weight-senders", lambda: published.send(orders)))
        said = [f"{_prefix(sender)}/{DESCRIBED}" for sender in orders]
        while not sending.done() and not store.check(said):
            await asyncio.sleep(READY_POLL_SECONDS)
        ready = not sending.done() and all(store.get(key) != NOTHING for key in said)
        offered = {"meeting": meeting.as_dict(), "senders": sorted(orders)}
        whole = ready and await ask(lambda place: {**offered, "rank": 1 + ranks * place})
        del store  # senders that wait for an engine which refused or died, or for another sender, know that nobody comes
        problems = [problem for problem in await sending if problem]
        return "" if ready and not whole else "; ".join(problems)

    def close(self) -> None:
        """What ranks have written goes with their nodes' folders."""


def send_parts(order: Order, root: Path, device: torch.device) -> str:
    """A rank's half: blocks until everything that the order names has been sent; "" or what went wrong. `root`: the folder of
    this node's published weights."""
    from torch.distributed.distributed_c10d import PrefixStore

    from runner.weights.weight_set import WeightSet, read_parts

    weights = WeightSet(0, root, location={name: root / file for name, file in order.location.items()})
    try:
        store, buckets = PrefixStore(_prefix(order.sender), store_of(order.meeting)), []
        try:
            buckets = divided(weights, list(order.location), BUCKET_BYTES)
        finally:
            store.set(DESCRIBED, json.dumps([[vars(piece) for piece in bucket] for bucket in buckets]))
        group = group_over(store, order.meeting, 0, None)
        for bucket in buckets:
            send(group, [tensor for _, tensor in read_parts(weights, [piece.name for piece in bucket])], device)
    except (RuntimeError, OSError) as error:  # torch.distributed's errors
        return f"broadcast by rank {order.sender}: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return ""


def _arriving(offer: Offer, rank: Rank) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of all senders, one sender after the other."""
    from torch.distributed.distributed_c10d import PrefixStore

    meeting = Meeting(**offer["meeting"])
    store = store_of(meeting)
    for sender in offer["senders"]:
        own = PrefixStore(_prefix(sender), store)
        buckets: list[list[dict[str, Any]]] = json.loads(own.get(DESCRIBED))
        group = group_over(own, meeting, offer["rank"] + rank.rank, rank.host)
        for bucket in buckets:
            yield from receive(group, [Piece(**piece) for piece in bucket], rank.device)


def _prefix(sender: int) -> str:
    return f"sender_{sender}"


register(FromRanks())
