"""Latent attention with a dense first layer on SGLang's CPU servers (Moonlight, Kimi-K2): logprobs, routes, live updates."""

from __future__ import annotations

import pytest
import torch
from cases import by_key, config, exported, reference_logprobs, requests
from reference import reference_routes

from runner.config.schema import Config

pytestmark = [pytest.mark.sglang, pytest.mark.night]  # minutes of server starts
LOW_RANK_QUERIES = "model.q_lora_rank=24"  # as Kimi-K2; Moonlight's queries have none


@pytest.mark.promise("latent attention is not served on a CPU")
@pytest.mark.parametrize(
    "overrides",
    [["precision=bf16"], ["precision=int4_qat", "precision.qat_placement=forward", LOW_RANK_QUERIES]],
    ids=["bf16", "int4-low-rank-queries"],
)
def test_latent_attention_computes_what_transformers_does_and_follows_its_weights(overrides: list[str]) -> None:
    """What SGLang absorbs from kv_b_proj into queries and outputs has to be derived anew by every update, so two syncs."""
    from runner.rollout.sglang import SglangPool

    cfg = config("sglang", "model=tiny_mla", "rollout.cpu_engines=1", *overrides)
    pool = SglangPool(cfg)
    try:
        for version in (0, 1):
            built, items = exported(cfg, seed=version + 1)
            assert pool.update_weights(version, iter(items)).problems == []
            check(cfg, pool, built)
        quantized = sum(form == "int4" for form in pool.describe()[0].formats.values())
        assert quantized == len(pool.plan.quantized)
        assert (quantized > 0) == cfg.precision.rollout.format.startswith("int4")
    finally:
        pool.close()


def check(cfg: Config, pool: object, built: torch.nn.Module) -> None:
    samples = by_key(list(pool.generate(requests(12, same_prompt=3))))  # type: ignore[attr-defined]
    assert len(samples) == 12
    for sample in samples.values():
        torch.testing.assert_close(sample.rollout_logprobs, reference_logprobs(built, sample), atol=1e-4, rtol=0)
        assert sample.routes is not None
        assert sample.routes.shape[1] == cfg.model.num_layers - cfg.model.num_dense_layers, "no rows of the dense layer"
        theirs = reference_routes(built, sample.tokens)
        assert torch.equal(sample.routes.long().sort(-1).values, theirs.sort(-1).values)
    for request, scored in zip(requests(3), pool.score([torch.tensor(r.tokens) for r in requests(3)]), strict=True):  # type: ignore[attr-defined]
        tokens = torch.tensor(request.tokens)
        with torch.no_grad():
            expected = built(tokens[None]).logits[0].log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0]
        torch.testing.assert_close(scored, expected, atol=1e-4, rtol=0)
