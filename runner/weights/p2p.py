"""Weights by one-sided reads: every engine fetches them out of the driver's memory, over RDMA, and the driver's CPU rests.

The bytes move through Mooncake's TransferEngine, which SGLang reads the weights of another instance with. Here too the side that
needs the weights reads: it knows when it has room, a read can be repeated, and addresses of an engine's memory are handed to
nobody. (Miles writes into the parameters of an engine instead, around the model's loader: with neither packed INT4 nor a hash
before the weights are in place.) The GPUs of one engine read one copy together, each its share, and exchange the shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from runner.weights.buckets import Piece, unpack
from runner.weights.transfer_engine import Endpoint, TransferError


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
        torch.cuda.synchronize(share.device)  # the copies of the bucket before are made out of the same memory
    try:
        endpoint.read(session, ranges, share.data_ptr())
    except TransferError as error:
        return str(error)
    return ""


def _problem_of_any(problem: str, group: Any) -> str:
    """A rank that stops alone would leave the others in the exchange."""
    problems: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    return next((found for found in problems if found), "")


def _exchanged(share: torch.Tensor, group: Any) -> torch.Tensor:
    whole = share.new_empty(share.numel() * dist.get_world_size(group))
    dist.all_gather(list(whole.split(share.numel())), share, group=group)
    return whole
