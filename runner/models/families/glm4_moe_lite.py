"""GLM-4.7-Flash (Glm4MoeLite): DeepSeek-V3's latent attention, router and experts, with one dense layer at the start."""

from __future__ import annotations

from typing import Any

from runner.config.schema import ModelConfig
from runner.models import common
from runner.models.families.deepseek import DeepSeek


class Glm4MoeLite(DeepSeek):
    name = "glm4_moe_lite"
    architectures: tuple[str, ...] = ("Glm4MoeLiteForCausalLM",)
    model_types: tuple[str, ...] = ("glm4_moe_lite",)

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        dense = model.num_dense_layers
        kinds = ["dense"] * dense + ["sparse"] * (model.num_layers - dense)
        return super().hf_config(model) | {"model_type": "glm4_moe_lite", "mlp_layer_types": kinds}

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        """transformers reads `mlp_layer_types`, and takes one dense layer where there is none, whatever engines find under
        `first_k_dense_replace`: both must say the same."""
        layers = common.ConfigReader(config, name).whole("num_hidden_layers", high=common.MAX_LAYERS)
        kinds = config.get("mlp_layer_types")
        dense = 1 if kinds is None else sum(kind == "dense" for kind in kinds) if isinstance(kinds, list) else -1
        if kinds is not None and kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
            raise ValueError(f"config.json of {name}: `mlp_layer_types` is {common.short(kinds)}; dense layers come first")
        common.ConfigReader(config, name).must_be("first_k_dense_replace", dense, absent=dense)
        absent = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": dense, "routed_scaling_factor": 1.8}
        return super().from_hf_config(absent | {"max_position_embeddings": 202752, "rms_norm_eps": 1e-5} | config, name)


FAMILY = Glm4MoeLite()
