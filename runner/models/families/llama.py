"""Llama 2 and 3, and what shares their architecture: grouped-query attention without norms on queries and keys, gated mlp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.config.schema import ModelConfig
from runner.models import common
from runner.models.family import Parameter


class Llama(common.DenseFamily):
    name = "llama"
    architectures: tuple[str, ...] = ("LlamaForCausalLM",)
    model_types: tuple[str, ...] = ("llama",)

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        yield from common.dense_decoder(model, output_bias=True)

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        return common.base_config(model) | {
            "model_type": "llama",
            "architectures": list(self.architectures),
            "head_dim": model.head_dim,
            "mlp_bias": False,
        }

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        reader = common.ConfigReader({"num_key_value_heads": None} | config, name, {"max_position_embeddings": 2048})
        reader.must_be("hidden_act", "silu", absent="silu")
        reader.must_be("mlp_bias", False, absent=False)
        head_dim = reader.optional_whole("head_dim", common.even_heads(reader), low=1)
        return common.plain_fields(reader, self.name, qk_norm=False, head_dim=head_dim)


FAMILY = Llama()
