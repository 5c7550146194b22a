"""Qwen2 and Qwen2.5, dense: grouped-query attention with biases on queries, keys and values, gated mlp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.config.schema import ModelConfig
from runner.models import common
from runner.models.family import Parameter


class Qwen2(common.DenseFamily):
    name = "qwen2"
    architectures: tuple[str, ...] = ("Qwen2ForCausalLM",)
    model_types: tuple[str, ...] = ("qwen2",)

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        yield from common.dense_decoder(model, output_bias=False)

    def window(self, config: dict[str, Any]) -> int | None:
        return common.qwen_window(config)

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        return common.base_config(model) | {
            "model_type": "qwen2",
            "architectures": list(self.architectures),
            "head_dim": model.head_dim,
            "use_sliding_window": False,
        }

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        reader = common.ConfigReader(config, name, {"num_key_value_heads": 32})
        reader.must_be("hidden_act", "silu", absent="silu")
        reader.must_be("attention_bias", True, absent=True)
        window = common.checked_window(reader, self.window(config))
        head_dim = reader.optional_whole("head_dim", common.even_heads(reader), low=1)
        return common.plain_fields(reader, self.name, qk_norm=False, head_dim=head_dim, window=window) | {"attention_bias": True}


FAMILY = Qwen2()
