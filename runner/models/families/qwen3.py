"""Qwen3, dense: grouped-query attention with RMS norms on queries and keys, gated mlp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.config.schema import ModelConfig
from runner.models import common
from runner.models.family import Parameter


class Qwen3(common.DenseFamily):
    name = "qwen3"
    architectures: tuple[str, ...] = ("Qwen3ForCausalLM",)
    model_types: tuple[str, ...] = ("qwen3",)

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        yield from common.dense_decoder(model, output_bias=True)

    def window(self, config: dict[str, Any]) -> int | None:
        return common.qwen_window(config)

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        return common.base_config(model) | {
            "model_type": "qwen3",
            "architectures": list(self.architectures),
            "head_dim": model.head_dim,
            "use_sliding_window": False,
        }

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        reader = common.ConfigReader(config, name, {"head_dim": 128, "num_key_value_heads": 32})
        window = common.checked_window(reader, self.window(config))
        reader.must_be("hidden_act", "silu", absent="silu")
        return common.plain_fields(reader, self.name, qk_norm=True, head_dim=reader.whole("head_dim"), window=window)


FAMILY = Qwen3()
