"""Qwen3-MoE: Qwen3 attention; every layer routes by softmax to the top-k experts, whose weights are renormalised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.config.schema import ModelConfig, Role
from runner.models import common
from runner.models.family import Parameter


class Qwen3Moe(common.SparseFamily):
    name = "qwen3_moe"
    architectures: tuple[str, ...] = ("Qwen3MoeForCausalLM",)
    model_types: tuple[str, ...] = ("qwen3_moe",)

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        yield common.embedding(model)
        for layer in range(model.num_layers):
            prefix = f"model.layers.{layer}"
            yield from common.grouped_query_attention(model, prefix, layer, output_bias=True)
            if layer < model.num_dense_layers:
                yield from common.gated_mlp(f"{prefix}.mlp", model.hidden_size, model.ffn_size, Role.dense_mlp, layer)
            else:
                yield from common.routed_experts(model, f"{prefix}.mlp", layer)
            yield from common.layer_norms(model, prefix, layer)
        yield from common.final_norm_and_head(model)

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        return common.base_config(model) | {
            "model_type": "qwen3_moe",
            "architectures": list(self.architectures),
            "head_dim": model.head_dim,
            "use_sliding_window": False,
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.experts_top_k,
            "moe_intermediate_size": model.expert_ffn_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(model.num_dense_layers)),
            "output_router_logits": False,
            "router_aux_loss_coef": 0.0,
        }

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        reader = common.ConfigReader(config, name, {"num_key_value_heads": 4, "num_experts_per_tok": 8})
        reader.must_be("use_sliding_window", False, absent=False)
        reader.must_be("hidden_act", "silu", absent="silu")
        reader.must_be("decoder_sparse_step", 1, absent=1)
        reader.must_be("norm_topk_prob", True, absent=False)
        dense = common.first_layers(reader, "mlp_only_layers")
        head_dim = reader.optional_whole("head_dim", common.even_heads(reader), low=1)
        experts = reader.whole("num_experts", "num_local_experts", high=common.MAX_EXPERTS)
        return common.plain_fields(reader, self.name, qk_norm=True, head_dim=head_dim) | {
            "num_experts": experts,
            "experts_top_k": reader.whole("num_experts_per_tok", high=experts),
            "expert_ffn_size": reader.whole("moe_intermediate_size"),
            "num_dense_layers": dense,
        }


FAMILY = Qwen3Moe()
