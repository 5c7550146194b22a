"""gpt-oss's experts with their weights as those of every other family lie in memory: [out, in], the gate's rows above the others.

transformers keeps them transposed, rows of gate and up projection taking turns. Quantization groups run along `in`, and so do the
kernels that trainer and engine have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward, use_experts_implementation


@use_experts_implementation(is_concatenated=True, is_transposed=False, has_bias=True)
class Experts(nn.Module):
    """gate_up_proj [E, 2 * ffn, hidden], gate_up_proj_bias [E, 2 * ffn], down_proj [E, hidden, ffn], down_proj_bias [E, hidden];
    taken from transformers' module. alpha and limit: of the clamped SwiGLU."""

    def __init__(self, config: Any, theirs: Any) -> None:
        super().__init__()
        self.num_experts: int = theirs.num_experts
        self.alpha: float = theirs.alpha
        self.limit: float = theirs.limit
        weights = {
            "gate_up_proj": _gate_first(theirs.gate_up_proj.transpose(1, 2)),
            "gate_up_proj_bias": _gate_first(theirs.gate_up_proj_bias),
            "down_proj": theirs.down_proj.transpose(1, 2).contiguous(),
            "down_proj_bias": theirs.down_proj_bias,
        }
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight.detach()))

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[..., 2 * ffn] -> [..., ffn]."""
        gate, up = gate_up.chunk(2, dim=-1)
        gate = gate.clamp(max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))

    def forward(self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = grouped_mm_experts_forward(self, hidden_states, router_indices, routing_weights)
        return output


def _gate_first(turns: torch.Tensor) -> torch.Tensor:
    """[E, 2 * ffn, ...] whose rows take turns -> the gate's, then the others."""
    return torch.cat([turns[:, 0::2], turns[:, 1::2]], dim=1)


def adapt(built: Any) -> None:
    for layer in built.model.layers:
        layer.mlp.experts = Experts(built.config, layer.mlp.experts)
