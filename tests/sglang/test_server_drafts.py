"""Draft models and weight updates: the policy's own multi-token-prediction layer follows every update, another model stays.

Greedy throughout: SGLang verifies by argmax on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Running, by_key, config, exported, flipped, requests

from runner import compose
from runner.samples import ExportedTensor

pytestmark = pytest.mark.sglang
MTP = "model.mtp_layers.0."


def speculating(*overrides: str) -> list[Any]:
    """The speculative group alone: a training run refuses sampled rollouts with it on a CPU."""
    return compose.load_config(["model=mimo_7b", *overrides]).speculative


@pytest.fixture(scope="module")
def with_mtp() -> Iterator[Any]:
    from runner.rollout.sglang import SglangPool

    cfg = config("sglang", "model=tiny_mtp", "precision=bf16")
    cfg.speculative = speculating("speculative=mtp", "speculative.num_draft_tokens=3")
    pool = SglangPool(cfg)
    yield Running(pool, cfg)
    pool.close()


def chain(items: list[ExportedTensor], projection: torch.Tensor) -> list[ExportedTensor]:
    """A policy whose next token depends on the last one only, and an MTP layer that is nothing but `projection` [H, 2H].

    Blocks add nothing to the residual stream, so with [0 | I], which hands the token's embedding through, the MTP layer computes
    the policy's own logits; with zeros it knows nothing.
    """
    replaced = {f"{MTP}input_proj.weight": projection}
    changed = []
    for item in items:
        (name,) = item.parts
        value = item.parts[name]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            value = torch.zeros_like(value)
        elif "norm" in name:
            value = torch.ones_like(value)
        changed.append(dataclasses.replace(item, parts={name: replaced.get(name, value).to(value.dtype)}))
    return changed


def drafted(running: Any) -> tuple[dict[Any, list[int]], dict[str, float]]:
    """(tokens of every sample, metrics) of a greedy run."""
    running.pool.metrics()
    samples = by_key(list(running.pool.generate(requests(6, temperature=0.0, max_response_tokens=40, routes=False))))
    return {key: sample.response_tokens.tolist() for key, sample in samples.items()}, running.pool.metrics()


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_a_new_mtp_layer_drafts_after_the_update_that_brought_it(with_mtp: Any, transport: str) -> None:
    """The same policy twice, with a blind and with a perfect MTP layer: only what is accepted changes."""
    pool, settings = with_mtp.pool, with_mtp.pool._fleet.settings
    hidden = with_mtp.cfg.model.hidden_size
    blind, perfect = torch.zeros(hidden, 2 * hidden), torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], 1)
    pool._fleet.settings = dataclasses.replace(settings, broadcast="gloo" if transport == "distributed" else None)
    try:
        with_mtp.sync(chain(with_mtp.items, blind), 1)
        tokens, before = drafted(with_mtp)
        with_mtp.sync(chain(with_mtp.items, perfect), 2)
        again, after = drafted(with_mtp)
    finally:
        pool._fleet.settings = settings
    assert tokens == again
    assert before["rollout/spec_accept_rate"] < 0.2 and before["rollout/spec_accept_length"] < 1.6
    # the last step of a sample proposes tokens that it has no room for
    assert after["rollout/spec_accept_rate"] > 0.9 and after["rollout/spec_accept_length"] > 3.5


def test_the_drafts_tensors_are_sent_and_verified_like_the_policys(with_mtp: Any) -> None:
    from runner.weights.stream import seal

    pool = with_mtp.pool
    mine = [item for item in with_mtp.items if item.name.startswith(MTP)]
    assert len(mine) > 8
    pool.version = -1  # as at the first sync: everything resident is checked
    report = pool.update_weights(0, iter(with_mtp.items))
    assert report.problems == [] and report.arrived == report.resident_checked == len(with_mtp.items)
    without = [item for item in with_mtp.items if item.name != mine[3].name]
    assert pool.update_weights(1, iter(without)).problems == [f"{mine[3].name}: did not arrive"]
    sealed = list(seal(iter(with_mtp.items)))
    victim = with_mtp.items.index(mine[3])
    sealed[victim] = dataclasses.replace(sealed[victim], exported=flipped(mine[3], mine[3].name))
    (problem,) = pool.update_weights(1, iter(sealed)).problems
    assert problem.startswith(f"draft: {mine[3].name}: bytes differ")
    with_mtp.fresh(2)


def test_without_mtp_drafting_its_layer_is_not_sent() -> None:
    from runner.rollout.sglang import SglangPool

    cfg = config("sglang", "model=tiny_mtp", "precision=bf16")
    _, items = exported(cfg)
    pool = SglangPool(cfg)
    try:
        report = pool.update_weights(0, iter(items))
        mtp = [item for item in items if item.name.startswith(MTP)]
        assert report.problems == [] and report.arrived == report.resident_checked == len(items) - len(mtp)
        assert report.wire_bytes == sum(part.nbytes for item in items if item not in mtp for part in item.parts.values())
    finally:
        pool.close()
