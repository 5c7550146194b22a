"""Draft models: what is accepted of them is what drafting.py computes for them, exactly. The policy's own multi-token-prediction
layer follows every weight update, another model stays.

Greedy throughout: SGLang verifies by argmax on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import P2P, Running, asked, by_key, config, exported, flipped, requests, started
from drafting import EagleHead, Propose, expected, greedy, mtp_step, recurrent, standalone
from safetensors.torch import save_file

from runner.config import compose
from runner.data import ExportedTensor
from runner.models.build import build_model
from runner.precision.plan import PrecisionPlan
from runner.rollout.sglang.model_folder import write_model_folder

pytestmark = [pytest.mark.sglang, pytest.mark.night]
MTP = "model.mtp_layers.0."


def speculating(*overrides: str) -> list[Any]:
    """The speculative group alone: a training run refuses sampled rollouts with it on a CPU."""
    return compose.load_config(["model=mimo_7b", *overrides]).speculative


@pytest.fixture(scope="module")
def with_mtp() -> Iterator[Any]:
    cfg = config("sglang", "model=tiny_mtp", "precision=bf16")
    cfg.speculative = speculating("speculative=mtp", "speculative.num_draft_tokens=3")
    pool = started(cfg)
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


@pytest.mark.promise("drafts take part in weight sync")
@pytest.mark.parametrize("transport", ["tensor", "distributed", P2P])
def test_a_new_mtp_layer_drafts_after_the_update_that_brought_it(with_mtp: Any, transport: str) -> None:
    """The same policy twice, with a blind and with a perfect MTP layer: only what is accepted changes."""
    pool = with_mtp.pool
    hidden = with_mtp.cfg.model.hidden_size
    blind, perfect = torch.zeros(hidden, 2 * hidden), torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], 1)
    with pool.driver.over(transport):
        with_mtp.sync(chain(with_mtp.items, blind), 1)
        tokens, before = drafted(with_mtp)
        with_mtp.sync(chain(with_mtp.items, perfect), 2)
        again, after = drafted(with_mtp)
    assert tokens == again
    assert before["rollout/spec_accept_rate"] < 0.2 and before["rollout/spec_accept_length"] < 1.6
    # the last step of a sample proposes tokens that it has no room for
    assert after["rollout/spec_accept_rate"] > 0.9 and after["rollout/spec_accept_length"] > 3.5


@pytest.mark.promise("drafts take part in weight sync")
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


def test_a_resident_bit_of_the_draft_that_differs_is_named(with_mtp: Any) -> None:
    with_mtp.fresh()
    pool = with_mtp.pool
    name = f"{MTP}self_attn.k_proj.weight"
    for change, wrong in ((lambda item: item, False), (lambda item: flipped(item, name), True)):
        changed = [change(item) if item.name == name else item for item in with_mtp.items]
        other = pool.driver.write(99, iter(changed), None)
        request = {"parts": [name], "repacked": [], "draft": [name]}
        try:
            update = asked(pool, "check", other, [name], **request)
        finally:
            other.remove()
        assert update.checked == 1
        assert bool(update.problems) == wrong
        assert not wrong or (
            update.problems[0].startswith(f"draft: {name}") and "differ from what was received" in update.problems[0]
        )


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


def weakened(items: list[ExportedTensor], scale: float, prefix: str = "") -> list[ExportedTensor]:
    """Blocks add only `scale` of what they did to the residual stream, in the layers whose names start with `prefix`."""
    return [
        dataclasses.replace(item, parts={name: value * scale for name, value in item.parts.items()})
        if item.name.startswith(prefix) and item.name.endswith(("o_proj.weight", "down_proj.weight"))
        else item
        for item in items
    ]


def loaded(cfg: Any, items: list[ExportedTensor]) -> torch.nn.Module:
    """The policy of an export as a module, in fp32."""
    built = build_model(cfg.model, dtype=torch.float32, seed=0)
    built.load_state_dict({name: value for item in items for name, value in item.parts.items()}, strict=False)
    return built.eval()


@contextlib.contextmanager
def drafting(method: str, folder: Path) -> Iterator[Any]:
    """A pool for tiny_dense whose servers draft with the model in `folder`."""
    from runner.rollout.sglang import SglangPool

    cfg = config("sglang", "model=tiny_dense", "precision=bf16", "router_replay=none")
    cfg.speculative = speculating(f"speculative={method}", "speculative.num_draft_tokens=3", f"speculative.draft_model={folder}")
    pool = SglangPool(cfg)
    try:
        yield Running(pool, cfg)
    finally:
        pool.close()


def check_drafts(running: Any, items: list[ExportedTensor], version: int, proposer: Callable[[Any], Propose]) -> float:
    """Sync `items`: tokens are those of plain decoding, and accepted is what `proposer` of the policy has right. The rate."""
    running.sync(items, version)
    tokens, metrics = drafted(running)
    again, cached = drafted(running)  # with prompts that are in the cache, the draft's too
    assert again == tokens and cached["rollout/spec_accept_rate"] == metrics["rollout/spec_accept_rate"]
    policy = loaded(running.cfg, items)
    propose, counts = proposer(policy), torch.zeros(3, dtype=torch.int64)
    for request in requests(6, routes=False):
        prompt, found = list(request.tokens), tokens[request.prompt_id, 0]
        response = greedy(policy, prompt, len(found) + 3)
        assert found == response[: len(found)]
        counts += torch.tensor(expected(prompt, response, len(found), propose, 3))
    steps, accepted, proposed = counts.tolist()
    assert metrics["rollout/spec_accept_rate"] == pytest.approx(accepted / proposed)
    assert metrics["rollout/spec_accept_length"] == pytest.approx(1 + accepted / steps)
    return float(metrics["rollout/spec_accept_rate"])


@pytest.mark.promise("what is accepted of drafts is what they have right")
def test_an_mtp_layer_drafts_from_its_own_cache(with_mtp: Any) -> None:
    """Partly right drafts, which depend on every earlier token and on the hidden states of the policy."""
    hidden = with_mtp.cfg.model.hidden_size
    generator = torch.Generator().manual_seed(2)
    projection = torch.cat([0.03 * torch.randn(hidden, hidden, generator=generator), torch.eye(hidden)], 1)
    items = weakened(weakened(with_mtp.items, 0.005, "model.layers."), 0.1, MTP)
    items = [
        dataclasses.replace(item, parts={item.name: projection}) if item.name == f"{MTP}input_proj.weight" else item
        for item in items
    ]
    rate = check_drafts(with_mtp, items, 1, lambda policy: recurrent(policy, mtp_step(policy)))
    assert 0.1 < rate < 0.9, rate


def write_draft(folder: Path, items: list[ExportedTensor]) -> None:
    cfg = config("sglang", "model=tiny_dense", "precision=bf16", "router_replay=none")
    write_model_folder(cfg.model, PrecisionPlan.build(cfg.model, cfg.precision, "rollout"), folder)
    save_file({n: t.contiguous() for i in items for n, t in i.parts.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.promise("what is restored for loading and not loaded is lost: a draft model that is not updated")
@pytest.mark.promise("a draft model sees the text without its first token")
def test_another_model_drafts_with_its_own_weights_over_updates(tmp_path: Path) -> None:
    """STANDALONE: the draft is the first policy. What is accepted of it falls with another policy and is back with the first:
    updates of the policy leave the draft alone.

    Of an equal draft, too, only a quarter is accepted here: SGLang's draft model never reads a sequence's first token, on any
    device, which a random model over a short prompt cannot do without."""
    cfg = config("sglang", "model=tiny_dense", "precision=bf16", "router_replay=none")
    policies = {seed: exported(cfg, seed=seed)[1] for seed in (1, 2)}
    write_draft(tmp_path, policies[1])
    draft = standalone(loaded(cfg, policies[1]))
    with drafting("draft", tmp_path) as running:
        rates = [check_drafts(running, policies[seed], version, lambda _: draft) for version, seed in enumerate((1, 2, 1))]
    assert 0.2 < rates[0] == rates[2] < 0.3 and rates[1] < 0.1, rates


@pytest.mark.promise("a draft model sees the text without its first token")
def test_a_model_equal_to_the_policy_is_always_right_where_the_first_token_does_not_matter(tmp_path: Path) -> None:
    """Blocks that add nothing: the next token depends on the last one only. The last step of a sample has no room for all of its
    drafts, but SGLang counts them as accepted: the rate is 1, not just near it."""
    cfg = config("sglang", "model=tiny_dense", "precision=bf16", "router_replay=none")
    items = weakened(exported(cfg)[1], 0.0)
    write_draft(tmp_path, items)
    draft = standalone(loaded(cfg, items))
    with drafting("draft", tmp_path) as running:
        assert check_drafts(running, items, 0, lambda _: draft) == 1.0


@pytest.mark.promise("what is accepted of drafts is what they have right")
def test_an_eagle_head_drafts_and_keeps_its_weights_over_updates(tmp_path: Path) -> None:
    """Random weights around a projection that hands the token's embedding through, which is right for a policy whose next token
    depends on little else. The embedding and the output layer that the head shares follow the policy."""
    cfg = config("sglang", "model=tiny_dense", "precision=bf16", "router_replay=none")
    head = EagleHead.random(cfg.model, seed=4)
    head.save(tmp_path)
    with drafting("eagle", tmp_path) as running:
        rates = []
        for version, (seed, scale) in enumerate([(1, 0.0), (2, 0.005), (1, 1.0), (1, 0.0)]):
            items = weakened(exported(cfg, seed=seed)[1], scale)
            rates.append(check_drafts(running, items, version, lambda policy: recurrent(policy, head.step(policy))))
    assert 0.9 > rates[0] == rates[3] > rates[1] > rates[2], rates
