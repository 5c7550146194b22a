"""Draft models and weight updates: the policy's own multi-token-prediction layer follows every update, another model stays.

Greedy throughout: SGLang verifies by argmax on a CPU.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import P2P, Running, by_key, config, exported, flipped, over, requests
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from runner import compose
from runner.precision.plan import PrecisionPlan
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


@pytest.mark.parametrize("transport", ["tensor", "distributed", P2P])
def test_a_new_mtp_layer_drafts_after_the_update_that_brought_it(with_mtp: Any, transport: str) -> None:
    """The same policy twice, with a blind and with a perfect MTP layer: only what is accepted changes."""
    pool, settings = with_mtp.pool, with_mtp.pool._fleet.settings
    hidden = with_mtp.cfg.model.hidden_size
    blind, perfect = torch.zeros(hidden, 2 * hidden), torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], 1)
    pool._fleet.settings = over(settings, transport)
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


def test_a_resident_bit_of_the_draft_that_differs_is_named(with_mtp: Any) -> None:
    from runner.rollout.sglang.fleet import EngineUpdate

    with_mtp.fresh()
    pool = with_mtp.pool
    name = f"{MTP}self_attn.k_proj.weight"
    for change, wrong in ((lambda item: item, False), (lambda item: flipped(item, name), True)):
        changed = [change(item) if item.name == name else item for item in with_mtp.items]
        other = pool._weight_writer().write(99, iter(changed), None)
        update = EngineUpdate(pool._fleet.engines[0])
        request = {"parts": [name], "repacked": [], "draft": [name]}
        try:
            pool._loop.run(pool._fleet._send("check", [update], other, [name], **request))
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


def without_the_first_token(policy: torch.nn.Module, drafts: int) -> float:
    """Share of drafts that are accepted of the policy itself, where it sees each text without its first token: SGLang shifts a
    draft model's inputs by one, as EAGLE's heads want it, also where the draft is a model of its own (STANDALONE)."""

    def greedy(tokens: list[int], count: int) -> list[int]:
        for _ in range(count):
            with torch.no_grad():
                tokens = [*tokens, int(policy(torch.tensor([tokens])).logits[0, -1].argmax())]
        return tokens

    accepted = proposed = 0
    for request in requests(6, routes=False):
        text, last = greedy(list(request.tokens), 40 + drafts + 1), len(request.tokens)
        while last < len(request.tokens) + 39:
            chain = greedy(text[1 : last + 1], drafts)[last:]
            matching = [chain[: i + 1] == text[last + 1 : last + 2 + i] for i in range(drafts)]
            accepted, proposed = accepted + sum(matching), proposed + drafts
            last += sum(matching) + 1
    return accepted / proposed


def test_another_model_drafts_with_its_own_weights_over_updates(tmp_path: Path) -> None:
    """STANDALONE: the draft is the first policy. What is accepted of it falls with another policy and is back with the first:
    updates of the policy leave the draft alone."""
    from runner.rollout.sglang import SglangPool
    from runner.rollout.sglang.model_folder import write_model_folder

    cfg = config("sglang", "model=tiny_dense", "precision=bf16", "router_replay=none")
    built, items = exported(cfg)
    write_model_folder(cfg.model, PrecisionPlan.build(cfg.model, cfg.precision, "rollout"), tmp_path)
    save_file({n: t.contiguous() for i in items for n, t in i.parts.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    cfg.speculative = speculating("speculative=draft", "speculative.num_draft_tokens=3", f"speculative.draft_model={tmp_path}")
    running = Running.__new__(Running)
    running.pool, running.cfg, running.model, running.items = SglangPool(cfg), cfg, built, items
    try:
        rates = []
        for version, seed in enumerate((1, 2, 1)):
            policy, stream = exported(cfg, seed=seed)
            running.sync(stream, version)
            tokens, metrics = drafted(running)
            rates.append(metrics["rollout/spec_accept_rate"])
            for request in requests(6, temperature=0.0, routes=False):
                sequence = torch.tensor([[*request.tokens, *tokens[request.prompt_id, 0]]])
                with torch.no_grad():
                    greedy = policy(sequence).logits[0].argmax(-1)[len(request.tokens) - 1 : -1].tolist()
                assert tokens[request.prompt_id, 0] == greedy
        assert rates[0] == rates[2] > 2 * rates[1], rates
        assert rates[0] == pytest.approx(without_the_first_token(built, drafts=3))
    finally:
        running.pool.close()


def eagle_head(cfg: Any, folder: Path) -> None:
    """An EAGLE head on disk that hands the last token's embedding through: for a `chain` policy, a perfect one."""
    model = cfg.model
    config = LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=model.num_heads, num_key_value_heads=model.num_kv_heads, head_dim=model.head_dim,
        max_position_embeddings=model.max_context_tokens, tie_word_embeddings=False,
    )  # fmt: skip
    folder.mkdir()
    described = config.to_dict() | {"architectures": ["LlamaForCausalLMEagle"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(described))
    state = {
        name.removeprefix("model."): torch.zeros_like(value) if name.endswith(("o_proj.weight", "down_proj.weight")) else value
        for name, value in LlamaForCausalLM(config).state_dict().items()
        if name.startswith("model.layers.0.") and "input_layernorm" not in name  # an EAGLE head has none
    }
    hidden = model.hidden_size
    state |= {"fc.weight": torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], 1), "fc.bias": torch.zeros(hidden)}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"})


def test_an_eagle_head_drafts_over_updates_of_the_policy(tmp_path: Path) -> None:
    """Its own weights stay; embeddings and output layer are the policy's, and follow it."""
    from runner.rollout.sglang import SglangPool

    cfg = config("sglang", "model=tiny_dense", "precision=bf16", "router_replay=none")
    eagle_head(cfg, tmp_path / "eagle")
    cfg.speculative = speculating(
        "speculative=eagle", "speculative.num_draft_tokens=3", f"speculative.draft_model={tmp_path / 'eagle'}"
    )
    pool = SglangPool(cfg)
    try:
        for version, seed in enumerate((1, 2)):
            items = chain(exported(cfg, seed=seed)[1], torch.zeros(0))
            assert pool.update_weights(version, iter(items)).problems == []
            parts = {name: value for item in items for name, value in item.parts.items()}
            embedding = parts["model.embed_tokens.weight"]
            scaled = embedding / (embedding.pow(2).mean(-1, keepdim=True) + cfg.model.norm_eps).sqrt()
            following = (scaled @ parts.get("lm_head.weight", embedding).T).argmax(-1).tolist()
            tokens, metrics = drafted(SimpleNamespace(pool=pool))
            assert metrics["rollout/spec_accept_rate"] > 0.9 and metrics["rollout/spec_accept_length"] > 3.5
            for request in requests(6, routes=False):
                expected, last = [], request.tokens[-1]
                for _ in range(40):
                    last = following[last]
                    expected.append(last)
                assert tokens[request.prompt_id, 0] == expected
    finally:
        pool.close()
