"""weight_transport=ranks: two ranks on two nodes send what they own to engines; the driver sees names and hashes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.config.choices import TransferProtocol
from runner.trainer.megatron import MegatronTrainer
from runner.weights.published import PublishedSet
from runner.weights.stream import digest
from runner.weights.transports import TRANSPORTS, Rank, Site
from tests.configs import composed, problems
from tests.megatron_trainer.scenario import batch
from tests.ray_nodes.conftest import two_nodes

NAME, HOST, ENGINES = "ranks", "127.0.0.1", 2
ON_RAY = (
    "rollout=sglang",
    "trainer=megatron",
    "cluster=ray",
    "parallelism=cpu2",
    "speculative=none",
    f"rollout.weight_transport={NAME}",
)


def site(folder: Path) -> Site:
    return Site(HOST, "lo", False, folder, folder, 0, TransferProtocol.tcp, ())


def taken(offer: dict[str, Any]) -> dict[str, str]:
    """Part name -> hash, as an engine of one rank receives by this offer."""
    rank = Rank(HOST, torch.device("cpu"), 0, None, is_draft=False)
    return {name: digest(tensor) for name, tensor in TRANSPORTS[NAME].receive(offer, rank, lambda name: True)}


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_every_rank_sends_its_own_stage_and_no_node_has_the_others(launched: Any, tmp_path: Path) -> None:
    cfg = two_nodes("pp2")
    cfg.rollout = composed("rollout=sglang", **{"rollout.weight_transport": NAME}).rollout
    launcher = launched(cfg)
    trainer, driver = MegatronTrainer(cfg), TRANSPORTS[NAME].driver(site(tmp_path))
    weights = driver.write(1, trainer.export("rollout"), None)
    assert isinstance(weights, PublishedSet) and not weights.problems and set(weights.owners.values()) == {0, 1}
    for node in launcher.nodes.all():
        (own,) = {file.parts[0][:9] for file in map(Path, node.ask("weight_files"))}
        assert own == f"rank_{node.place.ranks[0].rank:04d}"

    def carried(names: list[str], engine: Callable[[dict[str, Any]], dict[str, str]]) -> tuple[str, list[dict[str, str]]]:
        found: list[dict[str, str]] = []

        async def ask(offer: Callable[[int], dict[str, Any]]) -> bool:
            found.extend(await asyncio.gather(*(asyncio.to_thread(engine, offer(place)) for place in range(ENGINES))))
            return all(found)

        return asyncio.run(driver.carry(weights, names, ENGINES, 1, ask)), found

    assert carried(list(weights.digests), taken) == ("", [weights.digests] * ENGINES)
    some = [next(name for name, owner in weights.owners.items() if owner == rank) for rank in (1, 0)]
    for names in (some[:1], some):
        assert carried(names, taken) == ("", [{name: weights.digests[name] for name in names}] * ENGINES)
    began = time.monotonic()
    assert carried(some, lambda offer: {}) == ("", [{}] * ENGINES) and time.monotonic() - began < 30  # nobody comes
    trainer.step(batch(cfg))  # and the ranks go on
    again = driver.write(2, trainer.export("rollout"), weights)
    assert again.digests != weights.digests and again.digests.keys() == weights.digests.keys()
    trainer.close()


def test_it_needs_ranks_under_ray_and_gpus_of_their_own() -> None:
    composed(*ON_RAY)
    for changes, said in (
        (["cluster=local"], "has the processes of a trainer send"),
        (["trainer=torch"], "has the processes of a trainer send"),
        (["recipe=qwen3_30b_fp8"], "NCCL cannot broadcast between two processes on one GPU"),
    ):
        base = [f"rollout.weight_transport={NAME}"] if changes[0].startswith("recipe") else list(ON_RAY)
        assert any(said in problem.problem for problem in problems(*base, *changes)), changes
