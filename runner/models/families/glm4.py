"""GLM-4 (0414), dense: biases on queries, keys and values, half of each head rotated in neighbouring pairs, gate and up in one
matrix on disk too, and a norm behind the attention and behind the mlp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.config.schema import ModelConfig, Role
from runner.models import common
from runner.models.family import Cut, Parameter

NORMS = ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")
# what transformers takes where config.json has nothing
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
}


class Glm4(common.DenseFamily):
    name = "glm4"
    architectures: tuple[str, ...] = ("Glm4ForCausalLM",)
    model_types: tuple[str, ...] = ("glm4",)
    rotary_share = 0.5

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        ffn, hidden = model.ffn_size, model.hidden_size
        yield common.embedding(model)
        for layer in range(model.num_layers):
            prefix = f"model.layers.{layer}"
            yield from common.grouped_query_attention(model, prefix, layer, output_bias=False)
            # ranks cut gate rows and up rows alike, as of two matrices; trainers that divide it are refused
            yield Parameter(f"{prefix}.mlp.gate_up_proj.weight", Role.dense_mlp, (2 * ffn, hidden), layer, cut=Cut.outputs)
            yield Parameter(f"{prefix}.mlp.down_proj.weight", Role.dense_mlp, (hidden, ffn), layer, cut=Cut.inputs)
            for norm in NORMS:
                yield Parameter(f"{prefix}.{norm}.weight", Role.norm, (hidden,), layer)
        yield from common.final_norm_and_head(model)

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        base = common.base_config(model)
        base["rope_parameters"] = base["rope_parameters"] | {"partial_rotary_factor": self.rotary_share}
        return base | {
            "model_type": "glm4",
            "architectures": list(self.architectures),
            "head_dim": model.head_dim,
            "partial_rotary_factor": self.rotary_share,
        }

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        reader = common.ConfigReader(config, name, DEFAULTS)
        reader.must_be("hidden_act", "silu", absent="silu")
        reader.must_be("partial_rotary_factor", self.rotary_share, absent=self.rotary_share)
        head_dim = reader.optional_whole("head_dim", 128, low=1)
        fields = common.plain_fields(reader, self.name, qk_norm=False, head_dim=head_dim)
        return fields | {"attention_bias": reader.flag("attention_bias", True)}


FAMILY = Glm4()
