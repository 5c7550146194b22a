"""Rotary embeddings as transformers computes them: one set of frequencies for both trainers and the in-process engine.

Megatron has frequencies of its own for some kinds of scaling, with other names, defaults and roundings. Here every kind whose
angles depend on the position alone comes from transformers, and Megatron only applies it.

Shape legend: T positions, D rotated width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding, get_pos_emb_on_this_cp_rank
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from runner.config.schema import ModelConfig
from runner.models.agreement import Rope
from runner.models.published import checkpoint_config
from runner.trainer.megatron.arguments import Arguments, rope_scaling


@dataclass(frozen=True)
class Frequencies:
    """inverse [D / 2] fp32 on the CPU; `factor` multiplies cosines and sines."""

    inverse: torch.Tensor
    factor: float


def frequencies(model: ModelConfig) -> Frequencies | None:
    """The checkpoint's; None for plain rope, which Megatron computes as transformers does."""
    if model.hf_checkpoint is None:
        return None
    config = checkpoint_config(model)
    kind = Rope.of(config.to_dict()).kind
    if kind == "default":
        return None
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return Frequencies(inverse.float(), float(factor))


def scaling_arguments(model: ModelConfig, hf_config: dict[str, Any]) -> Arguments:
    """Arguments of TransformerConfig that a scaled rope asks for.

    With latent attention these are Megatron's own; elsewhere whole heads are rotated, so a factor on queries and keys is its
    square on their product, and fused kernels need not know it.
    """
    if model.kv_lora_rank:
        return rope_scaling(hf_config)
    scaled = frequencies(model)
    if scaled is None or scaled.factor == 1.0:
        return {}
    return {"softmax_scale": scaled.factor**2 / model.head_dim**0.5}


class PublishedRotary(RotaryEmbedding):
    """In the place of Megatron's YaRN embedding of latent attention, whatever the kind of scaling."""

    def __init__(self, published: Frequencies, like: RotaryEmbedding) -> None:
        torch.nn.Module.__init__(self)
        self.inv_freq, self.factor = published.inverse, published.factor
        self.cp_group, self.rotary_interleaved, self.seq_len_interpolation_factor = like.cp_group, False, None

    def forward(
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> tuple[torch.Tensor, float]:
        """Angles [T, 1, 1, D] fp32 and the factor."""
        self.inv_freq = self.inv_freq.to(torch.cuda.current_device())
        positions = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=self.inv_freq.dtype) + offset
        angles = torch.outer(positions, self.inv_freq)
        whole = torch.cat((angles, angles), dim=-1)[:, None, None, :]
        group = cp_group or self.cp_group
        if group is not None and group.size() > 1 and not packed_seq:
            whole = get_pos_emb_on_this_cp_rank(whole, 0, group)
        return whole, self.factor


def install(model: GPTModel, config: ModelConfig) -> None:
    """Give a model that was just built the checkpoint's frequencies."""
    published = frequencies(config)
    if published is None:
        return
    if not config.kv_lora_rank:
        model.rotary_pos_emb.inv_freq = published.inverse
        return
    for module in model.modules():
        if isinstance(module, MultiLatentAttention):
            module.rotary_pos_emb = PublishedRotary(published, module.rotary_pos_emb)
