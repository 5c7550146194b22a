"""Families that rollout=sglang takes and conf/model has no tiny model of, as twins (tests/twins.py): logprobs of transformers
over weights that were synced twice, resident bits verified."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import by_key, config, exported, reference_logprobs, requests
from reference import reference_routes

from runner.rollout.sglang.rules import FAMILIES
from tests import twins

pytestmark = [pytest.mark.sglang, pytest.mark.night]
TINY_MODELS = ("deepseek", "mimo", "qwen3", "qwen3_moe")  # the other files of this folder serve those
SERVED = [name for name in twins.one_of_each_family() if twins.family_name(name) in set(FAMILIES) - set(TINY_MODELS)]


@pytest.mark.parametrize("precision", ["bf16", "int4_qat"])
@pytest.mark.parametrize("name", SERVED)
def test_it_computes_what_transformers_does_and_follows_its_weights(tmp_path: Path, name: str, precision: str) -> None:
    from runner.rollout.sglang import SglangPool

    twins.twin(tmp_path / "twin", name)
    chosen = ["model=auto", f"model.hf_checkpoint={tmp_path / 'twin'}", "run=toy", "task=arithmetic", "rollout.cpu_engines=1"]
    cfg = config("sglang", *chosen, f"precision={precision}", "precision.qat_placement=forward", "warm_start.enabled=false")
    routed = bool(cfg.model.num_experts)
    pool = SglangPool(cfg)
    try:
        for version, spread in enumerate((1.5, 2.0)):
            built, items = exported(cfg, spread=spread)
            assert pool.update_weights(version, iter(items)).problems == []
            samples = by_key(list(pool.generate(requests(6, same_prompt=3, routes=routed))))
            assert len(samples) == 6
            for sample in samples.values():
                torch.testing.assert_close(sample.rollout_logprobs, reference_logprobs(built, sample), atol=1e-4, rtol=0)
                if routed:
                    assert sample.routes is not None
                    theirs = reference_routes(built, sample.tokens)
                    assert torch.equal(sample.routes.long().sort(-1).values, theirs.sort(-1).values)
        quantized = sum(form == "int4" for form in pool.describe()[0].formats.values())
        assert quantized == (len(pool.plan.quantized) if precision == "int4_qat" else 0)
    finally:
        pool.close()
