"""DeepSeek-V2 (V2-Lite, Coder-V2): DeepSeek-V3's latent attention and shared experts; a softmax router without a selection bias,
whose weights do not sum to one. It may choose groups of experts by their best one first.

transformers reads `norm_topk_prob` and leaves it alone; published folders have false.
"""

from __future__ import annotations

from typing import Any

from runner.config.choices import RouterScore
from runner.config.schema import ModelConfig
from runner.models import common
from runner.models.families.deepseek import DeepSeek

GREEDY, IN_GROUPS = "greedy", "group_limited_greedy"
# what transformers takes where config.json has nothing
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
}


class DeepSeekV2(DeepSeek):
    name = "deepseek_v2"
    architectures: tuple[str, ...] = ("DeepseekV2ForCausalLM",)
    model_types: tuple[str, ...] = ("deepseek_v2",)
    normalizes_top_k = False
    unused = common.KnownFamily.unused  # it has no multi-token-prediction layers

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        return super().hf_config(model) | {
            "model_type": "deepseek_v2",
            "norm_topk_prob": False,
            "scoring_func": "softmax",
            "topk_method": IN_GROUPS if model.expert_groups > 1 else GREEDY,
        }

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        reader = common.ConfigReader(config, name)
        reader.must_be("norm_topk_prob", False, absent=False)
        reader.must_be("scoring_func", "softmax", absent="softmax")
        reader.must_be("mlp_bias", False, absent=False)
        reader.whole("n_shared_experts")  # transformers always builds them
        method = reader.optional("topk_method", GREEDY)
        if method not in (GREEDY, IN_GROUPS):
            raise ValueError(f"config.json of {name}: `topk_method` is {common.short(method)}; known: {GREEDY}, {IN_GROUPS}")
        # of DeepSeek-V3's reading, which knows its own router only
        groups = {} if method == IN_GROUPS else {"n_group": 1, "topk_group": 1}
        others = {key: value for key, value in config.items() if key not in ("norm_topk_prob", "scoring_func", "topk_method")}
        absent = {"num_key_value_heads": config.get("num_attention_heads")} | DEFAULTS
        return super().from_hf_config(absent | others | groups, name) | {
            "router_score": RouterScore.softmax,
            "router_bias": False,
        }


FAMILY = DeepSeekV2()
