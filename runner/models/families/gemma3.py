"""Gemma 3, text: five layers with a sliding window, then one that sees everything, each kind with a rotary base of its own; norms
before and behind attention and mlp, whose weights are added to one; a tanh-approximated GELU; embeddings scaled by the root of
the width.

All of it is in transformers' own modules. `query_pre_attn_scalar`, windows and the local rotary base stay in config.json, where
these read them; the model group has the rotary base of layers that see everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.config.schema import ModelConfig, Role
from runner.models import common
from runner.models.family import Parameter

ACTIVATION = "gelu_pytorch_tanh"
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
# what transformers takes where config.json has nothing
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
}
WINDOW = 4096  # where config.json has nothing
LOCAL_THETA = 10000.0  # rotary base of layers with a window, of a model without a checkpoint


class Gemma3(common.DenseFamily):
    name = "gemma3"
    architectures: tuple[str, ...] = ("Gemma3ForCausalLM",)
    model_types: tuple[str, ...] = ("gemma3_text",)

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        yield common.embedding(model)
        for layer in range(model.num_layers):
            prefix = f"model.layers.{layer}"
            yield from common.grouped_query_attention(model, prefix, layer, output_bias=True)
            yield from common.gated_mlp(f"{prefix}.mlp", model.hidden_size, model.ffn_size, Role.dense_mlp, layer)
            for norm in NORMS:
                yield Parameter(f"{prefix}.{norm}.weight", Role.norm, (model.hidden_size,), layer)
        yield from common.final_norm_and_head(model)

    def window(self, config: dict[str, Any]) -> int | None:
        window: int | None = config.get("sliding_window", WINDOW)
        return window

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        base = common.base_config(model)
        del base["hidden_act"]
        return base | {
            "model_type": "gemma3_text",
            "architectures": list(self.architectures),
            "head_dim": model.head_dim,
            "hidden_activation": ACTIVATION,
            "query_pre_attn_scalar": model.head_dim,
            "sliding_window": WINDOW,
            "rope_local_base_freq": LOCAL_THETA,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": model.rope_theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL_THETA},
            },
        }

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        reader = common.ConfigReader(config, name, DEFAULTS)
        reader.must_be("hidden_activation", ACTIVATION, absent=ACTIVATION)
        reader.must_be("use_bidirectional_attention", False, absent=False)
        for key in ("final_logit_softcapping", "attn_logit_softcapping"):
            reader.must_be(key, None, absent=None)
        window = common.checked_window(reader, self.window(config))
        head_dim = reader.optional_whole("head_dim", 256, low=1)
        fields = common.plain_fields(reader, self.name, qk_norm=True, head_dim=head_dim, window=window)
        return fields | {"tied_embeddings": reader.flag("tie_word_embeddings", True)}


FAMILY = Gemma3()
