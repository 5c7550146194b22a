"""MiniMax-M2: grouped-query attention whose norms on queries and keys span all heads, half of each head rotated; every layer
routes by sigmoid with a selection bias. Experts lie on disk as Mixtral's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from runner.config.choices import RouterScore
from runner.config.schema import ModelConfig, Role
from runner.models import common
from runner.models.family import Parameter, StackedParameter

# what transformers takes where config.json has nothing
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 196608,
    "rope_theta": 5e6,
}
# of a published config.json; transformers' model is built as if it said this
FIXED: dict[str, Any] = {
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "shared_intermediate_size": 0,
    "router_jitter_noise": 0,
}


class MiniMaxM2(common.SparseFamily):
    name = "minimax_m2"
    architectures: tuple[str, ...] = ("MiniMaxM2ForCausalLM",)
    model_types: tuple[str, ...] = ("minimax_m2",)
    rotary_share = 0.5

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        yield common.embedding(model)
        for layer in range(model.num_layers):
            prefix = f"model.layers.{layer}"
            for parameter in common.grouped_query_attention(model, prefix, layer, output_bias=False):
                yield _over_all_heads(model, parameter)
            yield from common.block_sparse_experts(model, prefix, layer)
            bias = f"{prefix}.block_sparse_moe.e_score_correction_bias"
            yield Parameter(bias, Role.router, (model.num_experts,), layer)
            yield from common.layer_norms(model, prefix, layer)
        yield from common.final_norm_and_head(model)

    def stacked(self, model: ModelConfig) -> Iterator[StackedParameter]:
        for layer in self.moe_layers(model):
            prefix = f"model.layers.{layer}"
            yield from common.stacked_block_sparse(model, prefix)
            name = "e_score_correction_bias"
            whole = ((f"{prefix}.block_sparse_moe.{name}", None, 0, model.num_experts),)
            yield StackedParameter(f"{prefix}.mlp.{name}", whole)

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        base = common.base_config(model)
        base["rope_parameters"] = base["rope_parameters"] | {"partial_rotary_factor": self.rotary_share}
        return (
            base
            | FIXED
            | {
                "model_type": "minimax_m2",
                "architectures": list(self.architectures),
                "intermediate_size": model.expert_ffn_size,
                "head_dim": model.head_dim,
                "rotary_dim": int(model.head_dim * self.rotary_share),
                "num_local_experts": model.num_experts,
                "num_experts_per_tok": model.experts_top_k,
                "output_router_logits": False,
                "router_aux_loss_coef": 0.0,
            }
        )

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        reader = common.ConfigReader(config, name, DEFAULTS)
        reader.must_be("hidden_act", "silu", absent="silu")
        for key, value in FIXED.items():
            reader.must_be(key, value, absent=value)
        head_dim = reader.optional_whole("head_dim", 128, low=1)
        half = int(head_dim * self.rotary_share)
        reader.must_be("rotary_dim", half, absent=half)
        if set(reader.optional("attn_type_list", [1])) != {1}:
            raise ValueError(f"config.json of {name}: `attn_type_list` has layers of another kind than full attention (1)")
        experts = reader.whole("num_local_experts", high=common.MAX_EXPERTS)
        return common.plain_fields(reader, self.name, qk_norm=True, head_dim=head_dim) | {
            "num_experts": experts,
            "experts_top_k": reader.whole("num_experts_per_tok", high=experts),
            "expert_ffn_size": reader.whole("intermediate_size"),
            "router_score": RouterScore.sigmoid,
            "router_bias": True,
        }


def _over_all_heads(model: ModelConfig, parameter: Parameter) -> Parameter:
    """A norm on queries or keys as wide as all of them."""
    if parameter.role is not Role.norm:
        return parameter
    heads = model.num_heads if parameter.name.endswith("q_norm.weight") else model.num_kv_heads
    return replace(parameter, shape=(heads * model.head_dim,))


FAMILY = MiniMaxM2()
