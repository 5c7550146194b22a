"""Reading weights out of another process's memory: real processes, Mooncake's real TransferEngine, over TCP. RDMA is the same
calls on hardware that has it. Starts no server (test_server_weights.py does); needs what `make setup-sglang` installs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import P2P
from hypothesis import given
from hypothesis import strategies as st

from runner.data import ExportedTensor
from runner.weights import transfer_engine
from runner.weights.transfer_engine import Endpoint, TransferError
from runner.weights.transports.p2p import Lent, lent, ranges_of, receive
from runner.weights.weight_set import WeightSet, WeightWriter

HOST = "127.0.0.1"
needs_mooncake = P2P.marks[0]
pytestmark = [pytest.mark.sglang, pytest.mark.night]
DTYPES = (torch.bfloat16, torch.int32, torch.float8_e4m3fn, torch.float32, torch.int64, torch.uint8)

# Reads everything that is offered as one of RANKS ranks of an engine and prints a hash of every tensor.
READER = """
import json, os, sys
import torch
import torch.distributed as dist
from runner.weights.transports.p2p import Lent, receive
from runner.weights.stream import digest
from runner.weights.transfer_engine import Endpoint

offer, ranks, rank = json.loads(sys.stdin.read()), int(sys.argv[1]), int(sys.argv[2])
group = None
if ranks > 1:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[3]}", world_size=ranks, rank=rank)
    group = dist.group.WORLD
if os.environ.get("DEAF") == str(rank):
    offer["session"] = "127.0.0.1:1"
endpoint = Endpoint("127.0.0.1", "tcp")
buckets = [[Lent(**piece) for piece in bucket] for bucket in offer["buckets"]]
try:
    print(json.dumps({name: digest(t) for name, t in receive(endpoint, offer["session"], buckets, torch.device("cpu"), group)}))
except Exception as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""


@pytest.fixture(scope="module")
def endpoint() -> Endpoint:
    return Endpoint(HOST, "tcp")


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[WeightSet]:
    """Small buckets, so that there are several files; sizes at odd offsets; an empty tensor."""
    generator = torch.Generator().manual_seed(1)
    items = []
    for index in range(40):
        shape = [(7,), (3, 5), (128, 64), (0, 4), (1,)][index % 5]
        dtype = DTYPES[index % len(DTYPES)]
        size = torch.Size(shape).numel() * dtype.itemsize
        tensor = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)
        items.append(ExportedTensor(f"w{index}", "bf16", {f"w{index}": tensor}))
    writer = WeightWriter(tmp_path / "weights", durable=False, bucket_bytes=20_000)
    written = writer.write(0, iter(items), None)
    assert len(written.files) > 2
    yield written
    writer.close()


def read_by(weights: WeightSet, endpoint: Endpoint, names: list[str], ranks: int, deaf: int = -1) -> list[Any]:
    """What each rank of another process group received (or its error) while the parts are lent."""
    import json

    from runner.rollout.sglang.process import free_ports

    async def run() -> list[Any]:
        async with lent(endpoint, weights, names) as offer:
            (port,) = free_ports(HOST, 1)
            readers = [
                subprocess.Popen(
                    [sys.executable, "-c", READER, str(ranks), str(rank), str(port)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "DEAF": str(deaf)},
                )
                for rank in range(ranks)
            ]  # fmt: skip
            for reader in readers:
                assert reader.stdin is not None
                reader.stdin.write(json.dumps(offer))
                reader.stdin.close()
            return [json.loads(reader.stdout.read()) for reader in readers if reader.stdout is not None and not reader.wait(60)]

    return asyncio.run(run())


@pytest.mark.promise("transports")
@needs_mooncake
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_rank_reads_the_same_bits(weights: WeightSet, endpoint: Endpoint, ranks: int) -> None:
    """One rank reads all; three read a third of each bucket and exchange them."""
    found = read_by(weights, endpoint, list(weights.digests), ranks)
    assert found == [weights.digests] * ranks


@needs_mooncake
def test_named_parts_alone_are_lent(weights: WeightSet, endpoint: Endpoint) -> None:
    names = ["w12", "w2", "w39"]
    (found,) = read_by(weights, endpoint, names, 1)
    assert found == {name: weights.digests[name] for name in names}


@needs_mooncake
def test_a_rank_that_cannot_read_stops_all_ranks(weights: WeightSet, endpoint: Endpoint) -> None:
    found = read_by(weights, endpoint, list(weights.digests), 2, deaf=1)
    assert len(found) == 2 and all(
        "TransferError" in problem and "of 127.0.0.1:1 could not be read" in problem for problem in found
    )


@pytest.mark.promise("transports")
@needs_mooncake
def test_memory_is_out_of_reach_when_the_action_is_over(weights: WeightSet, endpoint: Endpoint) -> None:
    """The same process reads here: what a registration allows does not depend on who asks."""
    reader = Endpoint(HOST, "tcp")
    device = torch.device("cpu")

    async def run() -> tuple[dict[str, Any], int]:
        async with lent(endpoint, weights, list(weights.digests)) as offer:
            buckets = [[Lent(**piece) for piece in bucket] for bucket in offer["buckets"]]
            return offer, len(list(receive(reader, offer["session"], buckets, device)))

    offer, arrived = asyncio.run(run())
    assert arrived == len(weights.digests)
    kept = torch.arange(4096, dtype=torch.uint8)  # lives on, so that the address stays valid memory of this process
    into = torch.zeros(4096, dtype=torch.uint8)
    with reader.registered(into.data_ptr(), into.numel()):
        with endpoint.registered(kept.data_ptr(), kept.numel()):
            reader.read(endpoint.session, [(kept.data_ptr(), 4096)], into.data_ptr())
        assert torch.equal(into, kept)
        into.zero_()
        with pytest.raises(TransferError, match="could not be read over tcp"):
            reader.read(endpoint.session, [(kept.data_ptr(), 4096)], into.data_ptr())
    assert not into.any()


@needs_mooncake
def test_a_copy_is_made_before_anything_is_hashed(endpoint: Endpoint) -> None:
    """The receiver's buffer is open to the network: tensors that were handed out must not live in it."""
    source = torch.arange(256, dtype=torch.uint8)
    pieces = [Lent("a", "uint8", [128], source.data_ptr()), Lent("b", "uint8", [128], source.data_ptr() + 128)]
    reader = Endpoint(HOST, "tcp")
    with endpoint.registered(source.data_ptr(), source.numel()):
        run = receive(reader, endpoint.session, [[pieces[0]], [pieces[1]]], torch.device("cpu"))
        (_, first), (_, second) = run  # the second bucket is read into the same buffer
    assert torch.equal(first, source[:128]) and torch.equal(second, source[128:])


@needs_mooncake
def test_rdma_that_was_asked_for_is_not_tcp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Mooncake takes TCP by itself where it finds no device."""
    with pytest.raises(TransferError, match="no RDMA device"):
        monkeypatch.setattr(transfer_engine, "DEVICES", tmp_path / "nothing")
        Endpoint(HOST, "rdma")
    (tmp_path / "mlx5_9").mkdir()  # a device that the library cannot open
    monkeypatch.setattr(transfer_engine, "DEVICES", tmp_path)
    with pytest.raises(TransferError, match="finds no RDMA device among"):
        Endpoint(HOST, "rdma", ["mlx5_9"])


@needs_mooncake
def test_the_terminal_stays_clean(tmp_path: Path) -> None:
    code = "from pathlib import Path; from runner.weights.transfer_engine import Endpoint; "
    code += f"Endpoint('{HOST}', 'tcp', log=Path('log'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "log").exists()


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=8), st.integers(1, 4))
def test_shares_cover_a_bucket_once(pieces: list[tuple[int, bool]], ranks: int) -> None:
    """Every byte is read by exactly one rank, in order; neighbours in memory are one range."""
    bucket, address = [], 100
    for size, gap in pieces:
        address += 50 if gap else 0
        bucket.append(Lent("x", "uint8", [size], address))
        address += size
    wanted = [piece.address + i for piece in bucket for i in range(piece.bytes())]
    width = -(-len(wanted) // ranks)
    read = []
    for rank in range(ranks):
        ranges = ranges_of(bucket, rank * width, (rank + 1) * width)
        mine = [start + i for start, size in ranges for i in range(size)]
        assert len(mine) <= width
        assert all(a + size < b for (a, size), (b, _) in zip(ranges, ranges[1:], strict=False))
        read += mine
    assert read == wanted


def test_an_endpoint_says_everything_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transfer_engine, "DEVICES", tmp_path)
    monkeypatch.setattr(transfer_engine.importlib.util, "find_spec", lambda name: None)

    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(transfer_engine.ctypes, "CDLL", absent)
    found = transfer_engine.obstacles("rdma")
    assert [reason.split()[0] for reason in found] == ["this", "mooncake-transfer-engine", "libibverbs.so.1"]
    with contextlib.suppress(TransferError):
        Endpoint(HOST, "rdma")
        pytest.fail("an endpoint without its library")
