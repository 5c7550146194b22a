"""Mixtral: Mistral attention; every layer routes by softmax to the top-k experts, whose weights are renormalised.

On disk a layer's experts lie under `block_sparse_moe` as w1 (gate), w3 (up) and w2 (down); in memory transformers has them fused
under `mlp`, as every other family.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.config.schema import ModelConfig
from runner.models import common
from runner.models.family import Parameter, StackedParameter


class Mixtral(common.SparseFamily):
    name = "mixtral"
    architectures: tuple[str, ...] = ("MixtralForCausalLM",)
    model_types: tuple[str, ...] = ("mixtral",)

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        yield common.embedding(model)
        for layer in range(model.num_layers):
            prefix = f"model.layers.{layer}"
            yield from common.grouped_query_attention(model, prefix, layer, output_bias=False)
            yield from common.block_sparse_experts(model, prefix, layer)
            yield from common.layer_norms(model, prefix, layer)
        yield from common.final_norm_and_head(model)

    def stacked(self, model: ModelConfig) -> Iterator[StackedParameter]:
        for layer in self.moe_layers(model):
            yield from common.stacked_block_sparse(model, f"model.layers.{layer}")

    def window(self, config: dict[str, Any]) -> int | None:
        return config.get("sliding_window")

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        return common.base_config(model) | {
            "model_type": "mixtral",
            "architectures": list(self.architectures),
            "intermediate_size": model.expert_ffn_size,
            "head_dim": model.head_dim,
            "sliding_window": None,
            "num_local_experts": model.num_experts,
            "num_experts_per_tok": model.experts_top_k,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.0,
            "router_jitter_noise": 0.0,
        }

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        defaults = {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
        }
        reader = common.ConfigReader(config, name, defaults)
        reader.must_be("hidden_act", "silu", absent="silu")
        reader.must_be("attention_bias", False, absent=False)
        reader.must_be("router_jitter_noise", 0, absent=0)
        common.checked_window(reader, self.window(config))
        head_dim = reader.optional_whole("head_dim", common.even_heads(reader), low=1)
        experts = reader.whole("num_local_experts", "num_experts", high=common.MAX_EXPERTS)
        return common.plain_fields(reader, self.name, qk_norm=False, head_dim=head_dim) | {
            "num_experts": experts,
            "experts_top_k": reader.whole("num_experts_per_tok", high=experts),
            "expert_ffn_size": reader.whole("intermediate_size"),
        }


FAMILY = Mixtral()
