"""DeepSeek-V3 architecture (Moonlight, Kimi-K2): multi-head latent attention, first layers dense, then experts with a
sigmoid router, a selection bias, and shared experts fused into one mlp."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from runner.config.choices import RouterScore
from runner.config.schema import ModelConfig, Role
from runner.models import common
from runner.models.family import Cut, Parameter

# what transformers takes where config.json has nothing
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "num_key_value_heads": 128,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
}


class DeepSeek(common.SparseFamily):
    name = "deepseek"
    architectures: tuple[str, ...] = ("DeepseekV3ForCausalLM",)
    model_types: tuple[str, ...] = ("deepseek_v3", "kimi_k2")
    groups_experts = True

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        yield common.embedding(model)
        for layer in range(model.num_layers):
            prefix = f"model.layers.{layer}"
            yield from _latent_attention(model, f"{prefix}.self_attn", layer)
            yield from common.dense_or_shared_and_routed(model, f"{prefix}.mlp", layer)
            yield from common.layer_norms(model, prefix, layer)
        yield from common.final_norm_and_head(model)

    def unused(self, model: ModelConfig, names: Collection[str]) -> set[str]:
        """Multi-token-prediction layers (DeepSeek-V3: model.layers.61)."""
        return common.drafting_layers(model, names)

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        return common.base_config(model) | {
            "model_type": "deepseek_v3",
            "architectures": list(self.architectures),
            "q_lora_rank": model.q_lora_rank or None,
            "kv_lora_rank": model.kv_lora_rank,
            "qk_nope_head_dim": model.qk_nope_head_dim,
            "qk_rope_head_dim": model.qk_rope_head_dim,
            "v_head_dim": model.v_head_dim,
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
            # transformers implies these three; engines read them
            "moe_layer_freq": 1,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        }

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        reader = common.ConfigReader(config, name, DEFAULTS)
        reader.must_be("hidden_act", "silu", absent="silu")
        reader.must_be("rope_interleave", True, absent=True)
        reader.must_be("moe_layer_freq", 1, absent=1)
        reader.must_be("norm_topk_prob", True, absent=True)
        reader.must_be("scoring_func", "sigmoid", absent="sigmoid")
        reader.must_be("topk_method", "noaux_tc", absent="noaux_tc")
        query_key_dim = reader.whole("qk_nope_head_dim") + reader.whole("qk_rope_head_dim")
        experts = reader.whole("n_routed_experts", high=common.MAX_EXPERTS)
        return common.plain_fields(reader, self.name, qk_norm=False, head_dim=query_key_dim) | {
            "num_experts": experts,
            "experts_top_k": reader.whole("num_experts_per_tok", high=experts),
            "expert_ffn_size": reader.whole("moe_intermediate_size"),
            "num_shared_experts": reader.optional_whole("n_shared_experts", 0),
            "num_dense_layers": reader.whole("first_k_dense_replace", low=0),
            "router_score": RouterScore.sigmoid,
            "router_bias": True,
            "routed_scaling_factor": reader.number("routed_scaling_factor"),
            "expert_groups": _groups(reader, "n_group", 8),
            "expert_groups_top_k": _groups(reader, "topk_group", 4),
            "q_lora_rank": reader.optional_whole("q_lora_rank", 0),
            "kv_lora_rank": reader.whole("kv_lora_rank"),
            "qk_nope_head_dim": reader.whole("qk_nope_head_dim"),
            "qk_rope_head_dim": reader.whole("qk_rope_head_dim"),
            "v_head_dim": reader.whole("v_head_dim"),
        }


def _groups(reader: common.ConfigReader, key: str, absent: int) -> int:
    """Groups of the router; `absent` is what transformers takes. It cannot compute with null."""
    if reader.config.get(key, absent) is None:
        raise ValueError(f"config.json of {reader.name} has null as `{key}`")
    return reader.optional_whole(key, absent, low=1, high=common.MAX_EXPERTS)


def _latent_attention(model: ModelConfig, prefix: str, layer: int) -> Iterator[Parameter]:
    """MLA: queries direct or through a low rank, keys and values through one, the rope part of the key shared by all heads."""
    hidden, heads = model.hidden_size, model.num_heads
    queries = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)

    def matrix(name: str, rows: int, columns: int, cut: Cut) -> Parameter:
        together = model.q_lora_rank and name in ("q_a_proj", "kv_a_proj_with_mqa")
        fused = f"{prefix}.fused_qkv_a_proj_with_mqa" if together else None
        return Parameter(f"{prefix}.{name}.weight", Role.attention, (rows, columns), layer, fused=fused, cut=cut)

    def bias(name: str, rows: int) -> Iterator[Parameter]:  # of weights that are whole, or cut along their inputs
        if model.attention_bias:
            yield Parameter(f"{prefix}.{name}.bias", Role.attention, (rows,), layer)

    if model.q_lora_rank:
        yield matrix("q_a_proj", model.q_lora_rank, hidden, Cut.whole)
        yield from bias("q_a_proj", model.q_lora_rank)
        yield Parameter(f"{prefix}.q_a_layernorm.weight", Role.norm, (model.q_lora_rank,), layer)
        yield matrix("q_b_proj", queries, model.q_lora_rank, Cut.outputs)
    else:
        yield matrix("q_proj", queries, hidden, Cut.outputs)
    compressed = model.kv_lora_rank + model.qk_rope_head_dim
    yield matrix("kv_a_proj_with_mqa", compressed, hidden, Cut.whole)
    yield from bias("kv_a_proj_with_mqa", compressed)
    yield Parameter(f"{prefix}.kv_a_layernorm.weight", Role.norm, (model.kv_lora_rank,), layer)
    key_values = heads * (model.qk_nope_head_dim + model.v_head_dim)
    yield matrix("kv_b_proj", key_values, model.kv_lora_rank, Cut.outputs)
    yield matrix("o_proj", hidden, heads * model.v_head_dim, Cut.inputs)
    yield from bias("o_proj", hidden)


FAMILY = DeepSeek()
