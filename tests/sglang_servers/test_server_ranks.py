"""Engines of two ranks, as every recipe with more than one GPU per engine starts them: tensor parallel, and expert parallel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import P2P, Running, asked, config, reference_logprobs, requests, started
from reference import reference_routes

from runner.data import ExportedTensor

pytestmark = pytest.mark.sglang
INT4 = ("precision=int4_qat", "precision.roles=[routed_expert,attention]", "precision.qat_placement=forward")


@pytest.fixture(scope="module", params=["tensor parallel", pytest.param("expert parallel", marks=pytest.mark.night)])
def two_ranks(request: pytest.FixtureRequest) -> Iterator[Running]:
    expert = ["parallelism.engine_ep=2"] if request.param == "expert parallel" else []
    cfg = config("sglang", "model=tiny_moe", *INT4, "rollout.cpu_tp=2", *expert)
    pool = started(cfg)
    yield Running(pool, cfg)
    pool.close()


@pytest.mark.promise("engines of several ranks: shards, experts and transports")
@pytest.mark.parametrize("transport", ["tensor", "distributed", P2P])
def test_two_ranks_compute_what_transformers_does_over_every_transport(two_ranks: Any, transport: str) -> None:
    """Everything resident is checked, as at a first sync; the ranks' shares together are the tensors."""
    pool = two_ranks.pool
    pool.version = -1
    with pool.driver.over(transport):
        report = pool.update_weights(0, iter(two_ranks.items))
    assert report.problems == [] and report.arrived == report.resident_checked == len(two_ranks.items)
    samples = list(pool.generate(requests(8)))
    assert len(samples) == 8
    for sample in samples:
        torch.testing.assert_close(sample.rollout_logprobs, reference_logprobs(two_ranks.model, sample), atol=1e-4, rtol=0)
        theirs = reference_routes(two_ranks.model, sample.tokens)
        assert torch.equal(sample.routes.long().sort(-1).values, theirs.sort(-1).values)


@pytest.mark.promise("the engine's quantized set is read back and audited against the plan")
def test_every_ranks_formats_are_read_back(two_ranks: Any) -> None:
    formats = two_ranks.pool.describe()[0].formats
    assert all(formats[item.name] == item.format for item in two_ranks.items)
    assert sum(form == "int4" for form in formats.values()) == 4 * (8 * 3 + 4)


@pytest.mark.promise("engines of several ranks: shards, experts and transports")
@pytest.mark.parametrize("expert", [0, 7])
def test_a_bit_that_differs_on_one_rank_is_named_with_it(two_ranks: Any, expert: int) -> None:
    """The last integers of a row of down_proj are the second rank's share; of whole experts, the last four are its own."""
    two_ranks.fresh()
    pool = two_ranks.pool
    weight = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
    part = weight + "_packed"

    def change(item: ExportedTensor) -> ExportedTensor:
        packed = item.parts[part].clone()
        packed[3, -1] ^= 1
        return dataclasses.replace(item, parts={**item.parts, part: packed})

    items = [change(item) if item.name == weight else item for item in two_ranks.items]
    other = pool.driver.write(99, iter(items), None)
    parts = other.parts_of([weight])
    try:
        update = asked(pool, "check", other, parts, parts=parts, repacked=[])
    finally:
        other.remove()
    rank = 1 if two_ranks.cfg.parallelism.engine_ep == 1 else expert // 4
    assert update.problems and all(problem.startswith(f"rank {rank}: ") for problem in update.problems), update.problems
    assert part in update.problems[0] and "differ from what was received" in update.problems[0]
    two_ranks.fresh()
