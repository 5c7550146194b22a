"""The driver's side of weights that travel: rank 0 of a broadcast that meets for one action, or memory lent for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from runner.rollout.sglang.interface import name_of
from runner.rollout.sglang.process import free_ports
from runner.rollout.sglang.weight_files import BUCKET_BYTES, WeightSet, read_parts
from runner.weights import broadcast
from runner.weights.buckets import Piece, describe
from runner.weights.files import spans
from runner.weights.p2p import Lent
from runner.weights.transfer_engine import Endpoint

TIMEOUT_SECONDS = 120.0  # for engines to come to the meeting, and for each bucket


class Sender:
    """Reads the named parts of a set and broadcasts them, a bucket at a time."""

    def __init__(
        self, backend: str, host: str, size: int, weights: WeightSet, names: list[str], bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        """`host`: this machine's address that the meeting listens on."""
        if backend == "nccl":
            os.environ["NCCL_SOCKET_IFNAME"] = name_of(host)  # NCCL takes no address
        (port,) = free_ports(host, 1)
        self.meeting = broadcast.Meeting(host, port, size, backend, TIMEOUT_SECONDS)
        self._weights, self._device = weights, torch.device("cuda" if backend == "nccl" else "cpu")
        self._buckets: list[list[str]] = []
        self._pieces: list[list[Piece]] = []
        size_now = 0
        for name, tensor in read_parts(weights, names):
            (piece,) = describe([(name, tensor)])
            if not self._buckets or size_now >= bucket_bytes:
                self._buckets.append([])
                self._pieces.append([])
                size_now = 0
            self._buckets[-1].append(name)
            self._pieces[-1].append(piece)
            size_now += piece.bytes()

    def described(self) -> list[list[dict[str, Any]]]:
        """What the receivers must know, as JSON."""
        return [[vars(piece) for piece in bucket] for bucket in self._pieces]

    def start(self) -> Future[str]:
        """`run` in a thread of its own; a daemon: a meeting that nobody comes to must not hold up the end of the program."""
        sending: Future[str] = Future()

        def run() -> None:
            try:
                sending.set_result(self.run())
            except BaseException as error:
                sending.set_exception(error)

        threading.Thread(target=run, name="weight-sender", daemon=True).start()
        return sending

    def run(self) -> str:
        """Blocks until everything is sent; "" or what went wrong (an engine that did not come, or died on the way)."""
        try:
            group = broadcast.join(self.meeting, 0, self.meeting.host)
            for names in self._buckets:
                broadcast.send(group, [tensor for _, tensor in read_parts(self._weights, names)], self._device)
        except (RuntimeError, OSError) as error:  # torch.distributed's errors; a port that somebody else took
            return f"broadcast: {(str(error).splitlines() or [type(error).__name__])[0]}"
        return ""


@contextlib.asynccontextmanager
async def lent(endpoint: Endpoint, weights: WeightSet, names: list[str]) -> AsyncIterator[dict[str, Any]]:
    """What a reader must know (JSON) to fetch the named parts out of this process's memory, as long as the context lasts.

    The set's files are mapped and registered as they are; a file's parts are a bucket.
    """
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
