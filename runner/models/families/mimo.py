"""MiMo-7B: Qwen2-style attention (bias on q, k, v, no norms on them) and multi-token-prediction (MTP) layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from runner.config.schema import ModelConfig, Role
from runner.models import common
from runner.models.family import Cut, Parameter


class MiMoMtp:
    """`runner.models.family.MtpLayers` of MiMo."""

    prefix = "model.mtp_layers."

    def build(self, config: Any) -> tuple[list[Any], Any]:
        from runner.models import mimo_torch

        return mimo_torch.mtp_layers(config)


class MiMo(common.DenseFamily):
    name = "mimo"
    mtp = MiMoMtp()
    architectures: tuple[str, ...] = ("MiMoForCausalLM",)
    model_types: tuple[str, ...] = ("mimo",)

    def register(self) -> None:
        from runner.models import mimo_torch

        mimo_torch.register()

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        yield common.embedding(model)
        for layer in range(model.num_layers):
            yield from _decoder_layer(model, f"model.layers.{layer}", layer)
        yield from common.final_norm_and_head(model)
        for index in range(model.num_mtp_layers):
            yield from _mtp_layer(model, f"{self.mtp.prefix}{index}", model.num_layers + index)

    def unused(self, model: ModelConfig, names: Collection[str]) -> set[str]:
        """Multi-token-prediction layers that config.json does not name."""
        layers = {name: re.match(r"model\.mtp_layers\.(\d+)\.", name) for name in names}
        return {name for name, match in layers.items() if match and int(match[1]) >= model.num_mtp_layers}

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        return common.base_config(model) | {
            "model_type": "mimo",
            "architectures": list(self.architectures),
            "head_dim": model.head_dim,
            "use_sliding_window": False,
            "num_nextn_predict_layers": model.num_mtp_layers,
        }

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        reader = common.ConfigReader(config, name, {"num_key_value_heads": 32})
        reader.must_be("hidden_act", "silu", absent="silu")
        reader.must_be("use_sliding_window", False, absent=False)
        reader.must_be("attention_bias", True, absent=True)
        head_dim = reader.optional_whole("head_dim", common.even_heads(reader), low=1)
        return common.plain_fields(reader, self.name, qk_norm=False, head_dim=head_dim) | {
            "attention_bias": True,
            "num_mtp_layers": reader.optional_whole("num_nextn_predict_layers", 0, high=common.MAX_LAYERS),
        }


def _decoder_layer(model: ModelConfig, prefix: str, layer: int) -> Iterator[Parameter]:
    yield from common.grouped_query_attention(model, prefix, layer, output_bias=False)
    yield from common.gated_mlp(f"{prefix}.mlp", model.hidden_size, model.ffn_size, Role.dense_mlp, layer)
    yield from common.layer_norms(model, prefix, layer)


def _mtp_layer(model: ModelConfig, prefix: str, layer: int) -> Iterator[Parameter]:
    """A decoder layer behind a projection of [last hidden state, next token's embedding]; its glue has role `mtp`.

    Its attention and mlp weights have role `mtp` too: they draft, the policy never runs them, so QAT leaves them alone.
    """
    hidden = model.hidden_size
    for norm in ("token_layernorm", "hidden_layernorm"):
        yield Parameter(f"{prefix}.{norm}.weight", Role.mtp, (hidden,), layer)
    yield Parameter(f"{prefix}.input_proj.weight", Role.mtp, (hidden, 2 * hidden), layer, cut=Cut.outputs)
    for parameter in _decoder_layer(model, prefix, layer):
        yield replace(parameter, role=Role.mtp)
    yield Parameter(f"{prefix}.final_layernorm.weight", Role.mtp, (hidden,), layer)


FAMILY = MiMo()
