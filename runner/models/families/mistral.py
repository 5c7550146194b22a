"""Mistral: Llama without biases, heads of a width of their own, and in 7B v0.1 a sliding window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.config.schema import ModelConfig
from runner.models import common
from runner.models.family import Parameter


class Mistral(common.DenseFamily):
    name = "mistral"
    architectures: tuple[str, ...] = ("MistralForCausalLM",)
    model_types: tuple[str, ...] = ("mistral",)

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        yield from common.dense_decoder(model, output_bias=False)

    def window(self, config: dict[str, Any]) -> int | None:
        return config.get("sliding_window", 4096)

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        return common.base_config(model) | {
            "model_type": "mistral",
            "architectures": list(self.architectures),
            "head_dim": model.head_dim,
            "sliding_window": None,
        }

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        reader = common.ConfigReader(config, name, {"num_key_value_heads": 8, "max_position_embeddings": 131072})
        reader.must_be("hidden_act", "silu", absent="silu")
        reader.must_be("attention_bias", False, absent=False)
        common.checked_window(reader, self.window(config))
        head_dim = reader.optional_whole("head_dim", common.even_heads(reader), low=1)
        return common.plain_fields(reader, self.name, qk_norm=False, head_dim=head_dim)


FAMILY = Mistral()
