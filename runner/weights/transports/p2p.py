"""Weights by one-sided reads: every engine fetches them out of the driver's memory, over RDMA, and the driver's CPU rests.

The bytes move through Mooncake's TransferEngine, which SGLang reads the weights of another instance with. Here too the side that
needs the weights reads: it knows when it has room, a read can be repeated, and addresses of an engine's memory are handed to
nobody. (Miles writes into the parameters of an engine instead, around the model's loader: with neither packed INT4 nor a hash
before the weights are in place.) The GPUs of one engine read one copy together, each its share, and exchange the shares.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from runner.errors import UserError
from runner.weights import transfer_engine
from runner.weights.buckets import Piece, unpack
from runner.weights.transfer_engine import Endpoint, TransferError
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
    from runner.rollout.sglang.config import SglangRolloutConfig
    from runner.weights.weight_set import WeightSet


class PeerToPeer(Transport):
    name = "p2p"

    def traffic(self, stream: int, engines: int, ranks: int) -> tuple[int, str]:
        return stream * engines, "the GPUs of an engine read one copy together and exchange it among themselves"

    def obstacles(self, cfg: Config) -> Iterator[UserError]:
        protocol = _rollout(cfg).transfer_protocol
        if missing := transfer_engine.obstacles(protocol):
            yield UserError(
                f"weights cannot be read peer to peer over {protocol} here: {'; '.join(missing)}",
                key=KEY,
                fix=f"{KEY}=distributed or disk_delta, or (slower than those) rollout.transfer_protocol=tcp",
            )

    def warnings(self, cfg: Config) -> Iterator[str]:
        yield (
            "weight_transport=p2p: while weights move, whoever reaches this machine and the engines' can read them (RDMA and "
            "Mooncake know no keys); a change on the way is found by its hash"
        )

    def driver(self, site: Site) -> P2pDriver:
        return P2pDriver(site)

    def receive(self, offer: Offer, rank: Rank, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        """Target and draft each read what is theirs."""
        lent = [[Lent(**piece) for piece in bucket if wanted(piece["name"])] for bucket in offer["buckets"]]
        endpoint = _reader(rank.host, offer["protocol"], tuple(offer["devices"]))
        yield from receive(endpoint, offer["session"], lent, rank.device, rank.group)


class P2pDriver(WritesSets):
    transport = PeerToPeer.name

    def __init__(self, site: Site) -> None:
        log = site.logs / "transfer_engine.log"
        try:
            self.endpoint = Endpoint(site.host, site.transfer_protocol, site.transfer_devices, log)
        except TransferError as error:
            raise UserError(str(error), key=KEY, fix=f"look at {log}, or {KEY}=distributed") from error
        super().__init__(in_shared_memory(site))

    async def carry(self, weights: WeightSet, names: list[str], engines: int, ranks: int, ask: Ask) -> str:
        async with lent(self.endpoint, weights, names) as offer:
            await ask(lambda place: offer)
        return ""


@contextlib.asynccontextmanager
async def lent(endpoint: Endpoint, weights: WeightSet, names: list[str]) -> AsyncIterator[Offer]:
    """What a reader must know to fetch the named parts out of this process's memory, as long as the context lasts.

    The set's files are mapped and registered as they are; a file's parts are a bucket.
    """
    import numpy as np

    from runner.weights.files import spans

    wanted = set(names)
    buckets: list[list[dict[str, Any]]] = []
    maps: list[np.memmap[Any, Any]] = []  # alive as long as they are registered
    with contextlib.ExitStack() as stack:
        for file in weights.files:
            named = {name: span for name, span in spans(file).items() if name in wanted}
            if not named:
                continue
            maps.append(np.memmap(file, np.uint8, mode="r+"))
            address = maps[-1].ctypes.data
            # registering pins every page, which takes its time
            await asyncio.to_thread(stack.enter_context, endpoint.registered(address, maps[-1].size))
            buckets.append(
                [
                    vars(Lent(name, str(span.dtype).removeprefix("torch."), span.shape, address + span.offset))
                    for name, span in sorted(named.items(), key=lambda item: item[1].offset)
                ]
            )
        yield {
            "session": endpoint.session,
            "protocol": endpoint.protocol,
            "devices": endpoint.devices,
            "buckets": buckets,
        }


@functools.cache
def _reader(host: str, protocol: str, devices: tuple[str, ...]) -> Endpoint:
    return Endpoint(host, protocol, devices)


def _rollout(cfg: Config) -> SglangRolloutConfig:
    return cast("SglangRolloutConfig", cfg.rollout)


@dataclass(frozen=True)
class Lent(Piece):
    """A tensor in the lender's memory, at `address`."""

    address: int


def receive(
    endpoint: Endpoint, session: str, buckets: Sequence[Sequence[Lent]], device: torch.device, group: Any = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of all buckets, in their order, as copies that nobody else reaches.

    `group`: the process group of an engine whose ranks all call this with the same buckets; each reads its share, and the
    shares are exchanged. TransferError on every rank when one of them could not read.
    """
    import torch
    import torch.distributed as dist

    ranks, rank = (dist.get_world_size(group), dist.get_rank(group)) if group else (1, 0)
    widths = [-(-sum(piece.bytes() for piece in bucket) // ranks) for bucket in buckets]
    share = torch.empty(max(widths, default=0), dtype=torch.uint8, device=device)
    if not share.numel():
        return
    with endpoint.registered(share.data_ptr(), share.numel()):
        for bucket, width in zip(buckets, widths, strict=True):
            problem = _read_share(endpoint, session, ranges_of(bucket, rank * width, (rank + 1) * width), share)
            if group:
                problem = _problem_of_any(problem, group)
            if problem:
                raise TransferError(problem)
            yield from unpack(_exchanged(share[:width], group) if group else share[:width], bucket)


def ranges_of(bucket: Sequence[Lent], start: int, stop: int) -> list[tuple[int, int]]:
    """(address, size) of the bytes [start, stop) of a bucket; neighbours in memory are one range."""
    found: list[tuple[int, int]] = []
    position = 0
    for piece in bucket:
        size = piece.bytes()
        first, last = max(start - position, 0), min(stop - position, size)
        position += size
        if first >= last:
            continue
        if found and sum(found[-1]) == piece.address + first:
            found[-1] = (found[-1][0], found[-1][1] + last - first)
        else:
            found.append((piece.address + first, last - first))
    return found


def _read_share(endpoint: Endpoint, session: str, ranges: list[tuple[int, int]], share: torch.Tensor) -> str:
    if share.is_cuda:
        import torch

        torch.cuda.synchronize(share.device)  # the copies of the bucket before are made out of the same memory
    try:
        endpoint.read(session, ranges, share.data_ptr())
    except TransferError as error:
        return str(error)
    return ""


def _problem_of_any(problem: str, group: Any) -> str:
    """A rank that stops alone would leave the others in the exchange."""
    import torch.distributed as dist

    problems: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    return next((found for found in problems if found), "")


def _exchanged(share: torch.Tensor, group: Any) -> torch.Tensor:
    import torch.distributed as dist

    whole = share.new_empty(share.numel() * dist.get_world_size(group))
    dist.all_gather(list(whole.split(share.numel())), share, group=group)
    return whole


register(PeerToPeer())
