"""Weight updates of real servers: packed INT4, residency, transports, what the engines quantize, and traps met before."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import (
    EVERY_TRANSPORT,
    P2P,
    asked,
    assert_follows_over,
    by_key,
    config,
    exported,
    flipped,
    reference_logprobs,
    requests,
)
from reference import reference_routes

from runner.config.choices import PauseMode
from runner.errors import UserError
from runner.precision.plan import PrecisionPlan
from runner.rollout.audit import audit_pool

pytestmark = pytest.mark.sglang


def test_packed_int4_computes_with_the_trainers_effective_weights(sglang_int4: Any) -> None:
    """The wire carries integers and scales; logprobs and routes are those of transformers over decode(encode(w))."""
    built = sglang_int4.fresh()
    samples = list(sglang_int4.pool.generate(requests(12)))
    for sample in samples:
        torch.testing.assert_close(sample.rollout_logprobs, reference_logprobs(built, sample), atol=1e-4, rtol=0)
        theirs = reference_routes(built, sample.tokens)
        assert torch.equal(sample.routes.long().sort(-1).values, theirs.sort(-1).values)
    formats = sglang_int4.pool.describe()[0].formats
    for item in sglang_int4.items:
        assert formats[item.name] == item.format
    assert sum(form == "int4" for form in formats.values()) == 4 * (8 * 3 + 4)  # experts and attention of every layer


def test_shares_that_changed(sglang_int4: Any) -> None:
    sglang_int4.fresh()
    same = sglang_int4.pool.update_weights(1, iter(sglang_int4.items))
    assert (same.changed_integers, same.changed_scales, same.problems) == (0.0, 0.0, [])
    _, others = exported(sglang_int4.cfg, seed=2)
    other = sglang_int4.pool.update_weights(2, iter(others))
    assert other.changed_integers > 0.8 and other.changed_scales > 0.8
    packed = sum(item.parts[name].nbytes for item in others for name in item.parts)
    assert other.wire_bytes == packed
    assert other.arrived == len(others) and other.resident_checked == sglang_int4.cfg.mismatch.residency_tensors


def _resident_check(running: Any, names: list[str], change: Any, *, repacked: bool = False) -> list[str]:
    """Load the items, then ask the residency check about a set of files in which `change` was made to the named."""
    running.fresh()
    pool = running.pool
    changed = [change(item) if item.name in names else item for item in running.items]
    other = pool.driver.write(99, iter(changed), None)
    parts = other.parts_of(names)
    try:
        update = asked(pool, "check", other, parts, parts=parts, repacked=parts if repacked else [])
    finally:
        other.remove()
    assert update.checked == len(parts)
    return update.problems


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("model.layers.1.mlp.experts.3.down_proj", "weight_packed"),
        ("model.layers.1.mlp.experts.0.gate_proj", "weight_scale"),
        ("model.layers.0.self_attn.k_proj", "weight_packed"),
        ("model.layers.3.mlp.gate", "weight"),
        ("lm_head", "weight"),
    ],
)
def test_a_resident_bit_that_differs_from_what_was_sent_is_named(sglang_int4: Any, module: str, part: str) -> None:
    weight, name = f"{module}.weight", f"{module}.{part}"
    problems = _resident_check(sglang_int4, [weight], lambda item: flipped(item, name))
    assert problems[0].startswith(name) and "differ from what was received" in problems[0]
    assert all("resident effective" in problem for problem in problems[1:]), problems  # loading did not derive them again
    assert _resident_check(sglang_int4, [weight], lambda item: item) == []


def test_repacked_layers_are_restored_loaded_and_repacked_again(sglang_int4: Any) -> None:
    """How INT4 is checked on CUDA, here where repacking is deriving effective weights: by SGLang's own functions, a layer at a
    time, so that a sync asks for all of the layer."""
    layer, wrong = "model.layers.1.", "model.layers.1.mlp.experts.3.down_proj.weight"
    pool, delivery = sglang_int4.pool, sglang_int4.pool._fleet.versions.delivery
    settings = delivery.settings
    of_layer = [item.name for item in sglang_int4.items if item.name.startswith(layer)]
    pool._repacks, delivery.settings = True, dataclasses.replace(settings, repacks=True)
    try:
        for version in range(3):
            report = pool.update_weights(version, iter(sglang_int4.items))
            assert report.problems == [] and report.resident_checked >= len(of_layer)
    finally:
        pool._repacks, delivery.settings = False, settings
    assert _resident_check(sglang_int4, of_layer, lambda item: item, repacked=True) == []
    change = lambda item: flipped(item, f"{wrong}_packed") if item.name == wrong else item  # noqa: E731
    problems = _resident_check(sglang_int4, of_layer, change, repacked=True)
    assert [problem.partition(":")[0] for problem in problems] == [
        f"{layer}mlp.experts.effective w2_weight",
        f"{layer}mlp.experts.w2_weight_packed",
    ]
    sglang_int4.fresh()


def test_effective_weights_that_were_not_derived_again_are_found(sglang_int4: Any) -> None:
    """Loading without SGLang's session leaves the effective weights of the update before: the check sees it."""
    sglang_int4.fresh()
    pool = sglang_int4.pool
    _, others = exported(sglang_int4.cfg, seed=2)
    other = pool.driver.write(99, iter(others), None)
    parts = other.parts_of(["model.layers.1.mlp.experts.3.down_proj.weight"])
    try:
        update = asked(pool, "load", other, list(other.digests), digests=other.digests)
        assert update.problems == []
        update = asked(pool, "check", other, parts, parts=parts, repacked=[])
    finally:
        other.remove()
    assert any("effective w2_weight differs" in problem for problem in update.problems), update.problems
    sglang_int4.fresh()


def test_names_that_the_engine_does_not_know_are_found(sglang_fp32: Any) -> None:
    """SGLang's loaders skip a name that they do not know, with a line in the log."""
    sglang_fp32.fresh()
    pool = sglang_fp32.pool
    item = sglang_fp32.items[5]
    strange = dataclasses.replace(
        item, name="model.layers.0.mystery.weight", parts={"model.layers.0.mystery.weight": torch.ones(3, 4)}
    )
    other = pool.driver.write(99, iter([strange]), None)
    try:
        update = asked(pool, "check", other, list(strange.parts), parts=list(strange.parts), repacked=[])
    finally:
        other.remove()
    assert update.problems == ["model.layers.0.mystery.weight: has 12 values, but 0 resident values follow it"]


@pytest.mark.promise("tensor and distributed updates are refused outside of a session")
def test_stock_updates_outside_of_a_session_are_refused(sglang_fp32: Any) -> None:
    """Why the pool opens a session for every update."""
    from runner.rollout.sglang.client import Refused

    pool = sglang_fp32.pool
    client = pool._fleet.roster.engines[0].client
    body = {"names": [], "dtypes": [], "shapes": [], "group_name": "none"}
    with pytest.raises(Refused, match="between begin_weight_update"):
        pool._loop.run(client.post("/update_weights_from_distributed", body))


@pytest.mark.promise("transports")
@pytest.mark.parametrize("transport", ["distributed", "disk_full", "disk_delta", P2P])
def test_other_transports_bring_the_same_weights(sglang_int4: Any, transport: str) -> None:
    pool = sglang_int4.pool
    sglang_int4.fresh()
    with pool.driver.over(transport):
        whole = pool.update_weights(1, iter(sglang_int4.items))
        assert whole.problems == [] and whole.wire_bytes > 1_000_000
        items = list(sglang_int4.items)
        victim = next(i for i, item in enumerate(items) if item.name.endswith("experts.2.up_proj.weight"))
        items[victim] = flipped(items[victim], f"{items[victim].name.removesuffix('.weight')}.weight_packed")
        second = pool.update_weights(2, iter(items))
        assert second.problems == [] and 0 < second.changed_integers < 1e-4
        assert second.wire_bytes == (8 if transport == "disk_delta" else whole.wire_bytes)  # one word and its index
        samples = _greedy(pool)
    sglang_int4.sync(items, 3)
    assert all(torch.equal(samples[key].tokens, again.tokens) for key, again in _greedy(pool).items())


@pytest.mark.promise("transports")
@pytest.mark.parametrize("transport", EVERY_TRANSPORT)
def test_bf16_follows_over_every_transport(sglang_fp32: Any, transport: str) -> None:
    """The engine computes in fp32 here, so the bits of bf16 and of fp32 weights travel alike."""
    assert_follows_over(sglang_fp32.pool, sglang_fp32.cfg, transport, tolerance=1e-4)


@pytest.mark.promise("transports")
@pytest.mark.parametrize("transport", [P2P])
def test_weights_that_cannot_be_read_are_a_problem_and_the_next_sync_is_whole(sglang_int4: Any, transport: str) -> None:
    pool = sglang_int4.pool
    sglang_int4.fresh()
    with pool.driver.over(transport):
        endpoint = pool.driver.current.endpoint
        session, endpoint.session = endpoint.session, "127.0.0.1:1"
        report = pool.update_weights(1, iter(sglang_int4.items))
        assert "could not be read over tcp" in report.problems[0] and (report.arrived, pool.version) == (0, 0)
        endpoint.session = session
        again = pool.update_weights(1, iter(sglang_int4.items))
        assert again.problems == [] and again.arrived == len(sglang_int4.items) and pool.version == 1


def _greedy(pool: Any) -> Any:
    return by_key(list(pool.generate(requests(4, temperature=0.0))))


@pytest.mark.promise("the engine's quantized set is read back and audited against the plan")
def test_a_plan_that_the_engine_does_not_follow_stops_the_start(sglang_fp32: Any) -> None:
    described = sglang_fp32.pool.describe()
    audit_pool(sglang_fp32.pool.plan, described)
    int4 = config("sglang", "model=tiny_moe", "precision=int4_qat", "precision.qat_placement=forward")
    with pytest.raises(UserError, match="other formats than the precision plan.*run int4, engine bf16"):
        audit_pool(PrecisionPlan.build(int4.model, int4.precision, "rollout"), described)


@pytest.mark.promise("partial rollouts: kept prefix, spans per token and per row of routes")
@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_other_pause_modes_keep_requests_inside_the_server(sglang_fp32: Any, mode: str) -> None:
    """The server itself goes on with a sample: over a cache of the new weights (retract) or of both (in_place: mixed)."""
    pool = sglang_fp32.pool
    built = sglang_fp32.fresh()
    other, items = exported(sglang_fp32.cfg, seed=2)
    delivery = pool._fleet.versions.delivery
    settings = delivery.settings
    delivery.settings = dataclasses.replace(settings, pause_mode=PauseMode(mode))
    pool.metrics()
    try:
        short, long = requests(1, max_response_tokens=4, routes=False), requests(4, max_response_tokens=200, routes=False)
        run = pool.generate([*short, *[dataclasses.replace(r, prompt_id=f"long{i}") for i, r in enumerate(long)]])
        next(run)
        sglang_fp32.sync(items, 1)
        samples = list(run)
    finally:
        delivery.settings = settings
    assert len(by_key(samples)) == 4 and pool.metrics()["rollout/requests_continued"] == 0
    for sample in samples:
        old, new = sample.weight_spans
        assert (old.version, old.start, new.version, new.stop) == (0, 0, 1, 200) and old.stop == new.start
        before = reference_logprobs(built, sample)[: old.stop]
        torch.testing.assert_close(sample.rollout_logprobs[: old.stop], before, atol=1e-4, rtol=0)
        after = (sample.rollout_logprobs - reference_logprobs(other, sample))[new.start + 1 :].abs().max()
        assert after < 1e-4 if mode == "retract" else after > 1e-3
    sglang_fp32.fresh()
