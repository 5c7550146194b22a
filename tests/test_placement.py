"""Which node starts which ranks and engines, against golden files: what `plan` prints is what a run starts."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from runner.cluster.placement import Placement, placement
from runner.config import compose

GOLDEN = Path(__file__).parent / "golden" / "placement"
TWO_NODES = ["trainer=megatron", "rollout=sglang", "cluster.nodes=2", "speculative=none"]
RUNS = {
    "qwen3_235b_int4": ["recipe=qwen3_235b_int4"],
    "kimi_k2_int4": ["recipe=kimi_k2_int4"],
    "qwen3_30b_int4": ["recipe=qwen3_30b_int4"],
    "two_nodes": [*TWO_NODES, "parallelism=cpu4", "rollout.cpu_engines=2"],
    "engine_over_nodes": [
        *TWO_NODES,
        "cluster.nodes=4",
        "parallelism=cpu4",
        "rollout.cpu_engines=2",
        "rollout.cpu_tp=4",
        "rollout.cpu_nodes=2",
    ],
    "uneven": [*TWO_NODES, "parallelism.ranks=3", "rollout.cpu_engines=1"],
}


def _lines(placed: Placement) -> list[str]:
    """A line per node, short enough to read: ranks by device, engines by first device."""
    lines = []
    for node in placed.nodes:
        ranks = " ".join(f"{rank.rank}@{rank.device}" for rank in node.ranks)
        engines = " ".join(f"{e.engine}[{e.first_rank}:{e.first_rank + e.ranks}]@{e.device}" for e in node.engines)
        lines.append(f"node {node.node}, {node.gpus} GPUs: ranks {ranks or '-'}; engines {engines or '-'}")
    return lines


@pytest.mark.parametrize("run", RUNS)
def test_golden(run: str) -> None:
    cfg = compose.load([*RUNS[run], "cluster=ray"] if "recipe" not in RUNS[run][0] else RUNS[run], check_rules=False).config
    found, file = _lines(placement(cfg)), GOLDEN / f"{run}.yaml"
    if os.environ.get("RUNNER_UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(found, width=1000))
    assert found == yaml.safe_load(file.read_text())


def test_every_rank_and_engine_has_one_place() -> None:
    placed = placement(compose.load(["recipe=kimi_k2_int4"]).config)
    assert [rank.rank for _, rank in placed.ranks()] == list(range(256))
    assert {rank.device for _, rank in placed.ranks()} == set(range(8))
    assert [[node.node for node, _ in placed.engine(index)] for index in range(32)] == [[index] for index in range(32)]
    (alone,) = placement(compose.load([]).config).nodes
    assert asdict(alone) == {"node": 0, "gpus": 0, "ranks": (), "engines": ()}  # both in the loop's own process


def test_engines_beside_the_trainer_have_devices_of_their_own() -> None:
    apart = ["recipe=qwen3_30b_int4", "parallelism.colocate=false", "cluster=local", "parallelism.gpus_per_engine=4"]
    (node,) = placement(compose.load([*apart, "cluster.gpus_per_node=16"], check_rules=False).config).nodes
    assert [rank.device for rank in node.ranks] == list(range(8)) and [e.device for e in node.engines] == [8, 12]


def test_an_engine_over_two_nodes_is_in_two_parts() -> None:
    wide = ["recipe=qwen3_235b_int4", "parallelism.gpus_per_engine=16"]
    first, second = placement(compose.load(wide, check_rules=False).config).engine(1)
    assert [(node.node, place.first_rank, place.ranks) for node, place in (first, second)] == [(2, 0, 8), (3, 8, 8)]
