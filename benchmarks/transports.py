"""How fast weights reach engines that are other processes of this host, by transport; real processes and libraries, no server.

    python -m benchmarks.transports [MiB]       default 512; needs make setup-sglang

Each reader is a process that ends with private copies of all tensors: of files in shared memory, of a gloo broadcast, or of reads
out of the driver's memory through Mooncake over TCP (by two engines, or by one engine of two ranks that exchange halves). The
slower reader counts. `copy` is one process copying the same bytes, which none can beat.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from runner.data import ExportedTensor
from runner.rollout.sglang.process import free_ports
from runner.weights.place import shared_memory_folder
from runner.weights.transfer_engine import Endpoint
from runner.weights.transports.broadcast import Sender
from runner.weights.transports.p2p import lent
from runner.weights.weight_set import WeightSet, WeightWriter

HOST, READERS, ROUNDS, TENSOR_BYTES, BUCKET_BYTES = "127.0.0.1", 2, 5, 16 << 20, 128 << 20


def tensors(weights: WeightSet) -> int:
    return len(weights.digests)


def write(folder: Path, megabytes: int) -> WeightSet:
    generator = torch.Generator().manual_seed(0)
    items = (
        ExportedTensor(f"w{i}", "bf16", {f"w{i}": torch.randint(0, 255, (TENSOR_BYTES,), dtype=torch.uint8, generator=generator)})
        for i in range((megabytes << 20) // TENSOR_BYTES)
    )
    return WeightWriter(folder, durable=False, bucket_bytes=BUCKET_BYTES).write(0, items, None)


class Reader:
    """A process that waits for requests (a line of JSON each) and answers with its seconds."""

    def __init__(self, rank: int, meeting_port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.transports", "--reader", str(rank), str(meeting_port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)

    def answer(self) -> float:
        assert self._process.stdout is not None
        return float(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve_reader(rank: int, meeting_port: int) -> None:
    import torch.distributed as dist
    from safetensors import safe_open

    from runner.weights.buckets import Piece
    from runner.weights.transports import broadcast, p2p

    dist.init_process_group("gloo", init_method=f"tcp://{HOST}:{meeting_port}", world_size=READERS, rank=rank)
    endpoint = Endpoint(HOST, "tcp", log=Path(os.devnull))
    cpu = torch.device("cpu")
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        count = 0
        if "files" in request:
            for path in request["files"]:
                with safe_open(path, framework="pt") as opened:
                    count += sum(opened.get_tensor(name).clone() is not None for name in opened.keys())  # noqa: SIM118
        elif "meeting" in request:
            group = broadcast.join(broadcast.Meeting(**request["meeting"]), 1 + rank, HOST)
            for bucket in request["buckets"]:
                count += len(list(broadcast.receive(group, [Piece(**piece) for piece in bucket], cpu)))
        else:
            buckets = [[p2p.Lent(**piece) for piece in bucket] for bucket in request["buckets"]]
            shared = dist.group.WORLD if request["together"] else None
            for _ in p2p.receive(endpoint, request["session"], buckets, cpu, shared):
                count += 1
        assert count == request["count"], (count, request["count"])
        print(time.perf_counter() - began, flush=True)


async def by_reads(readers: list[Reader], endpoint: Endpoint, weights: WeightSet, together: bool) -> float:
    async with lent(endpoint, weights, list(weights.digests)) as offer:
        for reader in readers:
            reader.ask({**offer, "together": together, "count": tensors(weights)})
        return max(reader.answer() for reader in readers)


def by_files(readers: list[Reader], weights: WeightSet) -> float:
    for reader in readers:
        reader.ask({"files": [str(file) for file in weights.files], "count": tensors(weights)})
    return max(reader.answer() for reader in readers)


def by_broadcast(readers: list[Reader], weights: WeightSet) -> float:
    sender = Sender("gloo", HOST, 1 + READERS, weights, list(weights.digests), BUCKET_BYTES)
    described, sending = sender.described(), sender.start()
    for reader in readers:
        reader.ask({"meeting": sender.meeting.as_dict(), "buckets": described, "count": tensors(weights)})
    slowest = max(reader.answer() for reader in readers)
    assert sending.result() == ""
    return slowest


def copying(megabytes: int) -> float:
    flat = torch.randint(0, 255, (megabytes << 20,), dtype=torch.uint8)
    began = time.perf_counter()
    for piece in flat.split(TENSOR_BYTES):
        piece.clone()
    return time.perf_counter() - began


def main() -> None:
    if sys.argv[1:2] == ["--reader"]:
        serve_reader(int(sys.argv[2]), int(sys.argv[3]))
        return
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    folder = shared_memory_folder(megabytes << 20)
    (port,) = free_ports(HOST, 1)
    readers = [Reader(rank, port) for rank in range(READERS)]
    endpoint = Endpoint(HOST, "tcp", log=folder / "transfer_engine.log")
    try:
        weights = write(folder, megabytes)
        ways = {
            "copy in one process": lambda: copying(megabytes),
            "tensor: files in shared memory, two engines": lambda: by_files(readers, weights),
            "distributed: gloo broadcast, two engines": lambda: by_broadcast(readers, weights),
            "p2p over TCP, two engines": lambda: asyncio.run(by_reads(readers, endpoint, weights, False)),
            "p2p over TCP, one engine of two ranks": lambda: asyncio.run(by_reads(readers, endpoint, weights, True)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS + 1):
            for name, way in ways.items():
                seconds[name].append(way())
        copied = statistics.median(seconds["copy in one process"][1:])
        for name, found in seconds.items():
            median = statistics.median(found[1:])  # the first round warms up
            print(f"{name:45} {median:6.2f} s  {megabytes / 1024 / median:6.2f} GiB/s  {median / copied:5.1f} x copy")
    finally:
        for reader in readers:
            reader.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
