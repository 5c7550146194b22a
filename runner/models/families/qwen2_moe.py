"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): Qwen2 attention; experts chosen by softmax, whose weights are not renormalised, beside
a shared expert behind a sigmoid gate of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.config.schema import ModelConfig, Role
from runner.models import common
from runner.models.family import Parameter


class Qwen2Moe(common.SparseFamily):
    name = "qwen2_moe"
    architectures: tuple[str, ...] = ("Qwen2MoeForCausalLM",)
    model_types: tuple[str, ...] = ("qwen2_moe",)
    normalizes_top_k = False
    gates_shared_expert = True

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        hidden = model.hidden_size
        yield common.embedding(model)
        for layer in range(model.num_layers):
            prefix = f"model.layers.{layer}"
            yield from common.grouped_query_attention(model, prefix, layer, output_bias=False)
            if layer < model.num_dense_layers:
                yield from common.gated_mlp(f"{prefix}.mlp", hidden, model.ffn_size, Role.dense_mlp, layer)
            else:
                yield from common.routed_experts(model, f"{prefix}.mlp", layer)
                shared = model.num_shared_experts * model.expert_ffn_size
                yield from common.gated_mlp(f"{prefix}.mlp.shared_expert", hidden, shared, Role.shared_expert, layer)
                yield Parameter(f"{prefix}.mlp.shared_expert_gate.weight", Role.router, (1, hidden), layer)
            yield from common.layer_norms(model, prefix, layer)
        yield from common.final_norm_and_head(model)

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        return common.base_config(model) | {
            "model_type": "qwen2_moe",
            "architectures": list(self.architectures),
            "head_dim": model.head_dim,
            "use_sliding_window": False,
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.experts_top_k,
            "moe_intermediate_size": model.expert_ffn_size,
            "shared_expert_intermediate_size": model.num_shared_experts * model.expert_ffn_size,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(model.num_dense_layers)),
            "output_router_logits": False,
            "router_aux_loss_coef": 0.0,
        }

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        reader = common.ConfigReader(config, name, {"num_key_value_heads": 16, "num_experts_per_tok": 4})
        reader.must_be("hidden_act", "silu", absent="silu")
        reader.must_be("qkv_bias", True, absent=True)
        reader.must_be("decoder_sparse_step", 1, absent=1)
        reader.must_be("norm_topk_prob", False, absent=False)
        common.full_attention(reader)
        dense = common.first_layers(reader, "mlp_only_layers")
        head_dim = reader.optional_whole("head_dim", common.even_heads(reader), low=1)
        experts = reader.whole("num_experts", high=common.MAX_EXPERTS)
        width, shared = reader.whole("moe_intermediate_size"), reader.whole("shared_expert_intermediate_size")
        if shared % width:
            raise ValueError(
                f"config.json of {name}: a shared expert of {shared} beside experts of {width}; it must be as wide as several"
            )
        return common.plain_fields(reader, self.name, qk_norm=False, head_dim=head_dim) | {
            "attention_bias": True,
            "num_experts": experts,
            "experts_top_k": reader.whole("num_experts_per_tok", high=experts),
            "expert_ffn_size": width,
            "num_shared_experts": shared // width,
            "num_dense_layers": dense,
        }


FAMILY = Qwen2Moe()
