"""Servers of other kinds on a CPU, each started once: block FP8, and greedy n-gram speculation with routes."""

from __future__ import annotations

import pytest
import torch
from cases import assert_follows_over, config, exported, reference_logprobs, requests, started
from reference import reference_routes

from runner.config import compose
from runner.weights import transfer_engine

pytestmark = [pytest.mark.sglang, pytest.mark.night]  # minutes of server starts


@pytest.mark.promise("transports")
def test_fp8_blocks_compute_with_their_effective_weights_over_every_transport() -> None:
    # k_proj has 64 rows here, and SGLang cannot cut its stacked q, k and v at half a block
    cfg = config("sglang", "model=tiny_moe", "precision=fp8_rollout", "precision.roles=[routed_expert]")
    pool = started(cfg)
    try:
        built, items = exported(cfg)
        assert pool.update_weights(0, iter(items)).problems == []
        assert sum(form == "fp8" for form in pool.describe()[0].formats.values()) == len(pool.plan.quantized) > 0
        for sample in pool.generate(requests(6)):
            torch.testing.assert_close(sample.rollout_logprobs, reference_logprobs(built, sample), atol=1e-3, rtol=0)
        for transport in ("distributed", "disk_full", "disk_delta", *([] if transfer_engine.obstacles("tcp") else ["p2p"])):
            assert_follows_over(pool, cfg, transport, tolerance=1e-3)
    finally:
        pool.close()


@pytest.mark.promise("a tree of n-gram drafts gives wrong routes")
def test_greedy_ngram_speculation_changes_neither_tokens_nor_routes() -> None:
    """Training refuses speculation on a CPU, because SGLang verifies greedily there; at temperature 0 that is exact."""
    from runner.rollout.sglang import SglangPool

    cfg = config("sglang", "model=tiny_moe", "precision=bf16")
    cfg.speculative = compose.load_config(["speculative=ngram"]).speculative
    pool = SglangPool(cfg)
    try:
        built, items = exported(cfg)
        assert pool.update_weights(0, iter(items)).problems == []
        samples = list(pool.generate(requests(8, temperature=0.0, max_response_tokens=60)))
        for sample in samples:
            with torch.no_grad():
                greedy = built(sample.tokens[None]).logits[0].argmax(-1)[sample.prompt_length - 1 : -1]
            assert torch.equal(sample.response_tokens, greedy)
            torch.testing.assert_close(sample.rollout_logprobs, reference_logprobs(built, sample), atol=1e-4, rtol=0)
            theirs = reference_routes(built, sample.tokens)
            assert torch.equal(sample.routes.long().sort(-1).values, theirs.sort(-1).values)
        metrics = pool.metrics()
        assert metrics["rollout/spec_accept_length"] > 1.0 and 0 < metrics["rollout/spec_accept_rate"] <= 1.0
    finally:
        pool.close()
