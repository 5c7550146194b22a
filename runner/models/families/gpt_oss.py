"""gpt-oss: attention with sinks, every second layer with a sliding window, biases everywhere; every layer routes to the top-k
experts, whose weights are a softmax of their own logits, through a clamped SwiGLU.

A folder holds the experts of a projection in one tensor (runner/models/stacks.py), MXFP4 as published or bf16. alpha and limit of
the SwiGLU, windows and rotary scaling stay in config.json, where transformers' own modules read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from runner.config.choices import RouterScore
from runner.config.schema import ModelConfig, Role
from runner.models import common
from runner.models.family import Cut, InStack, Parameter, StackedParameter

# what transformers takes where config.json has nothing
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
}
WINDOW = 128  # of a model without a checkpoint, and where config.json has nothing


class GptOss(common.SparseFamily):
    name = "gpt_oss"
    architectures: tuple[str, ...] = ("GptOssForCausalLM",)
    model_types: tuple[str, ...] = ("gpt_oss",)

    def adapt(self, built: Any) -> None:
        from runner.models import gpt_oss_torch

        gpt_oss_torch.adapt(built)

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        yield common.embedding(model)
        for layer in range(model.num_layers):
            prefix = f"model.layers.{layer}"
            yield from common.grouped_query_attention(model, prefix, layer, output_bias=True)
            yield Parameter(f"{prefix}.self_attn.sinks", Role.attention, (model.num_heads,), layer, cut=Cut.outputs)
            yield Parameter(f"{prefix}.mlp.router.weight", Role.router, (model.num_experts, model.hidden_size), layer)
            yield Parameter(f"{prefix}.mlp.router.bias", Role.router, (model.num_experts,), layer)
            for expert in range(model.num_experts):
                yield from _expert(model, f"{prefix}.mlp.experts", layer, expert)
            yield from common.layer_norms(model, prefix, layer)
        yield from common.final_norm_and_head(model)

    def stacked(self, model: ModelConfig) -> Iterator[StackedParameter]:
        ffn, hidden = model.expert_ffn_size, model.hidden_size
        for layer in self.moe_layers(model):
            prefix = f"model.layers.{layer}.mlp"
            yield from common.stacked_experts(model, prefix)
            gate_up: list[tuple[str, int | None, int, int]] = []
            down: list[tuple[str, int | None, int, int]] = []
            for expert in range(model.num_experts):
                name = f"{prefix}.experts.{expert}"
                gate_up += [(f"{name}.gate_proj.bias", expert, 0, ffn), (f"{name}.up_proj.bias", expert, ffn, 2 * ffn)]
                down.append((f"{name}.down_proj.bias", expert, 0, hidden))
            yield StackedParameter(f"{prefix}.experts.gate_up_proj_bias", tuple(gate_up))
            yield StackedParameter(f"{prefix}.experts.down_proj_bias", tuple(down))

    def routers(self, model: ModelConfig) -> list[str]:
        return [f"model.layers.{layer}.mlp.router" for layer in self.moe_layers(model)]

    def window(self, config: dict[str, Any]) -> int | None:
        window: int | None = config.get("sliding_window", WINDOW)
        return window

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        return common.base_config(model) | {
            "model_type": "gpt_oss",
            "architectures": list(self.architectures),
            "intermediate_size": model.expert_ffn_size,
            "head_dim": model.head_dim,
            "sliding_window": WINDOW,
            "num_local_experts": model.num_experts,
            "num_experts_per_tok": model.experts_top_k,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.0,
        }

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        reader = common.ConfigReader(config, name, DEFAULTS)
        reader.must_be("hidden_act", "silu", absent="silu")
        reader.must_be("attention_bias", True, absent=True)
        window = common.checked_window(reader, self.window(config))
        experts = reader.whole("num_local_experts", high=common.MAX_EXPERTS)
        head_dim = reader.optional_whole("head_dim", 64, low=1)
        return common.plain_fields(reader, self.name, qk_norm=False, head_dim=head_dim, window=window) | {
            "attention_bias": True,
            "num_experts": experts,
            "experts_top_k": reader.whole("num_experts_per_tok", "experts_per_token", high=experts),
            "expert_ffn_size": reader.whole("intermediate_size"),
            "router_score": RouterScore.top_k_softmax,
        }


def _expert(model: ModelConfig, prefix: str, layer: int, expert: int) -> Iterator[Parameter]:
    """Matrices and biases of one expert, and where a folder holds them; `prefix` ends in `experts`."""
    for weight in common.gated_mlp(
        f"{prefix}.{expert}", model.hidden_size, model.expert_ffn_size, Role.routed_expert, layer, expert
    ):
        module = weight.name.removesuffix(".weight")
        turn = ("gate_proj", "up_proj", "down_proj").index(module.rpartition(".")[2])
        together = turn < 2
        name = f"{prefix}.{'gate_up_proj' if together else 'down_proj'}"
        stack = InStack(name, model.num_experts, first=turn % 2, step=2 if together else 1)
        bias = Parameter(
            f"{module}.bias", weight.role, weight.shape[:1], layer, expert, cut=common.of_bias(weight.cut), stack=stack
        )
        yield from (replace(weight, stack=stack), bias)


FAMILY = GptOss()
