"""GLM-4.5, 4.6 and 4.7 (Glm4Moe): grouped-query attention, half of each head rotated, first layers dense, then experts with
DeepSeek-V3's sigmoid router and selection bias beside shared experts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from runner.config.choices import RouterScore
from runner.config.schema import ModelConfig
from runner.models import common
from runner.models.family import Parameter

# what transformers takes where config.json has nothing
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "rms_norm_eps": 1e-5,
}


class Glm4Moe(common.SparseFamily):
    name = "glm4_moe"
    architectures: tuple[str, ...] = ("Glm4MoeForCausalLM",)
    model_types: tuple[str, ...] = ("glm4_moe",)
    rotary_share = 0.5
    groups_experts = True

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        yield common.embedding(model)
        for layer in range(model.num_layers):
            prefix = f"model.layers.{layer}"
            yield from common.grouped_query_attention(model, prefix, layer, output_bias=False)
            yield from common.dense_or_shared_and_routed(model, f"{prefix}.mlp", layer)
            yield from common.layer_norms(model, prefix, layer)
        yield from common.final_norm_and_head(model)

    def unused(self, model: ModelConfig, names: Collection[str]) -> set[str]:
        """Multi-token-prediction layers (GLM-4.5-Air: model.layers.46)."""
        return common.drafting_layers(model, names)

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        base = common.base_config(model)
        base["rope_parameters"] = base["rope_parameters"] | {"partial_rotary_factor": self.rotary_share}
        return base | {
            "model_type": "glm4_moe",
            "architectures": list(self.architectures),
            "head_dim": model.head_dim,
            "partial_rotary_factor": self.rotary_share,
            "use_qk_norm": model.qk_norm,
            "n_routed_experts": model.num_experts,
            "num_experts_per_tok": model.experts_top_k,
            "moe_intermediate_size": model.expert_ffn_size,
            "n_shared_experts": model.num_shared_experts,
            "first_k_dense_replace": model.num_dense_layers,
            "routed_scaling_factor": model.routed_scaling_factor,
            "norm_topk_prob": True,
            "n_group": model.expert_groups,
            "topk_group": model.expert_groups_top_k,
            "num_nextn_predict_layers": 0,
        }

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        reader = common.ConfigReader(config, name, DEFAULTS)
        reader.must_be("hidden_act", "silu", absent="silu")
        reader.must_be("norm_topk_prob", True, absent=True)
        reader.must_be("partial_rotary_factor", self.rotary_share, absent=self.rotary_share)
        experts = reader.whole("n_routed_experts", high=common.MAX_EXPERTS)
        head_dim = reader.optional_whole("head_dim", common.even_heads(reader), low=1)
        return common.plain_fields(reader, self.name, qk_norm=reader.flag("use_qk_norm", False), head_dim=head_dim) | {
            "num_experts": experts,
            "experts_top_k": reader.whole("num_experts_per_tok", high=experts),
            "expert_ffn_size": reader.whole("moe_intermediate_size"),
            "num_shared_experts": reader.optional_whole("n_shared_experts", 1, low=1),
            "num_dense_layers": reader.whole("first_k_dense_replace", low=0),
            "router_score": RouterScore.sigmoid,
            "router_bias": True,
            "routed_scaling_factor": reader.number("routed_scaling_factor"),
            "expert_groups": reader.optional_whole("n_group", 1, low=1, high=common.MAX_EXPERTS),
            "expert_groups_top_k": reader.optional_whole("topk_group", 1, low=1, high=common.MAX_EXPERTS),
        }


FAMILY = Glm4Moe()
