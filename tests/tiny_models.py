"""Fields of tiny models that several tests build on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from runner.config.choices import RouterScore
from tests.configs import composed

# conf/model/tiny_dense.yaml, smaller
BASE: dict[str, Any] = asdict(composed("model=tiny_dense").model) | {
    "num_layers": 2,
    "head_dim": 16,
    "max_context_tokens": 128,
    "rope_theta": 10000.0,
    "initializer_range": 0.05,
}
del BASE["name"], BASE["family"]  # each test's own
MOE: dict[str, Any] = {"num_experts": 4, "experts_top_k": 2, "expert_ffn_size": 64}
MLA: dict[str, Any] = {
    "qk_norm": False,
    "num_kv_heads": 4,
    "head_dim": 24,
    "num_dense_layers": 1,
    "num_shared_experts": 2,
    "router_score": RouterScore.sigmoid,
    "router_bias": True,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
