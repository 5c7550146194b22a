"""weight_transport=ranks without ranks: senders in threads send files that they wrote to engines in threads, over gloo."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.config.choices import TransferProtocol
from runner.data import ExportedTensor
from runner.weights.bits import Changes
from runner.weights.published import Published, PublishedSet, Session, collect, tensors
from runner.weights.stream import digest
from runner.weights.transports import TRANSPORTS, Rank, Site, ranks
from runner.weights.weight_set import WeightWriter

HOST, OWNERS, ENGINES, RANKS = "127.0.0.1", (0, 2), 2, 2


def published(root: Path, send: Any) -> PublishedSet:
    """Four tensors of each owner."""
    found = []
    for owner in OWNERS:
        made = {f"w{owner}.{i}": torch.full((100 + i,), float(owner * 10 + i)) for i in range(4)}
        items = (ExportedTensor(name, "bf16", {name: tensor}) for name, tensor in made.items())
        written = WeightWriter(root / f"rank_{owner}", durable=False, bucket_bytes=900).write(0, items, None)
        files = [str(path.relative_to(root)) for path in written.files]
        location = {part: str(path.relative_to(root)) for part, path in written.location.items()}
        sizes = {name: tensor.nbytes for name, tensor in made.items()}
        found.append(Published(owner, files, written.digests, written.parts, written.formats, sizes, location, Changes(), {}, []))
    session = Session("version 0", Changes(), [], [file for part in found for file in part.files], lambda: None, send)
    return collect(0, tensors(found, session))


def taken(offer: dict[str, Any], rank: int) -> dict[str, str]:
    """Part name -> hash, as this rank of an engine receives."""
    who = Rank(HOST, torch.device("cpu"), rank, None, is_draft=False)
    return {name: digest(tensor) for name, tensor in TRANSPORTS["ranks"].receive(offer, who, lambda name: True)}


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(names or None: all, what an engine's rank does with an offer) -> (what went wrong, what every engine's ranks got, seconds,
    the weights)."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(ranks, "BUCKET_BYTES", 1000)
    site = Site(HOST, "lo", False, tmp_path, tmp_path, 0, TransferProtocol.tcp, ())
    driver = TRANSPORTS["ranks"].driver(site)

    def send(orders: Mapping[int, ranks.Order]) -> list[str]:
        with ThreadPoolExecutor(4) as threads:
            return list(threads.map(lambda order: ranks.send_parts(order, tmp_path, torch.device("cpu")), orders.values()))

    weights = published(tmp_path, send)

    def carry(names: list[str] | None, engine: Callable[[dict[str, Any], int], dict[str, str]]) -> Any:
        got: list[dict[str, str]] = []

        async def ask(offer: Callable[[int], dict[str, Any]]) -> bool:
            each = [(offer(place), rank) for place in range(ENGINES) for rank in range(RANKS)]
            got.extend(await asyncio.gather(*(asyncio.to_thread(engine, *given) for given in each)))
            return all(got)

        began = time.monotonic()
        problem = asyncio.run(driver.carry(weights, names or list(weights.digests), ENGINES, RANKS, ask))
        return problem, got, time.monotonic() - began, weights

    return carry


def test_every_rank_of_every_engine_gets_what_all_senders_own(carried: Any) -> None:
    problem, got, _, weights = carried(None, taken)
    assert problem == "" and len(weights.digests) == 8 and set(weights.owners.values()) == set(OWNERS)
    assert got == [weights.digests] * (ENGINES * RANKS)


def test_only_what_is_asked_for_is_sent_and_by_its_owner_alone(carried: Any) -> None:
    names = ["w2.3", "w2.0"]
    problem, got, _, weights = carried(names, taken)
    assert problem == "" and got == [{name: weights.digests[name] for name in names}] * (ENGINES * RANKS)
    offers: list[dict[str, Any]] = []

    def seen(offer: dict[str, Any], rank: int) -> dict[str, str]:
        offers.append(offer)
        return taken(offer, rank)

    carried(names, seen)
    assert {tuple(offer["senders"]) for offer in offers} == {(2,)}


def test_nobody_waits_for_engines_that_refused(carried: Any) -> None:
    problem, got, seconds, _ = carried(None, lambda offer, rank: {})
    assert problem == "" and got == [{}] * (ENGINES * RANKS) and seconds < 20


def test_a_sender_without_its_files_is_named_before_engines_are_asked(carried: Any, tmp_path: Path) -> None:
    import shutil

    shutil.rmtree(tmp_path / "rank_2")
    for names in (["w2.1"], None):
        problem, got, seconds, _ = carried(names, taken)
        assert "broadcast by rank 2" in problem and not got and seconds < 20
