"""MiMo as transformers modules: a Qwen2 decoder with MTP layers, built from transformers' own Qwen2 parts.

transformers has no module for `model_type: mimo`. Names follow the published checkpoint (`model.mtp_layers.0.*`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding


class MiMoConfig(Qwen2Config):
    model_type = "mimo"
    num_nextn_predict_layers: int = 0


class MiMoMTPLayer(Qwen2DecoderLayer):
    """Predicts the token after next: input_proj([norm(hidden of token t), norm(embedding of token t + 1)]), then a layer."""

    def __init__(self, config: MiMoConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx=0)  # the config lists attention kinds of decoder layers only; all are full attention
        self.self_attn.layer_idx = layer_idx  # its own place in a KV cache, behind the decoder's layers
        self.token_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.final_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(  # type: ignore[override]
        self,
        hidden_BTH: torch.Tensor,
        next_embedding_BTH: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states [B, T, H] whose lm_head logits at position t predict token t + 2.

        `hidden_BTH` is the decoder's output after its last norm, `next_embedding_BTH` the embedding of token t + 1.
        """
        joined = torch.cat([self.hidden_layernorm(hidden_BTH), self.token_layernorm(next_embedding_BTH)], dim=-1)
        output = super().forward(
            self.input_proj(joined), attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
        )
        return self.final_layernorm(output)


class MiMoModel(Qwen2Model):
    config_class = MiMoConfig
    config: MiMoConfig

    def __init__(self, config: MiMoConfig) -> None:
        super().__init__(config)
        first = config.num_hidden_layers
        self.mtp_layers = nn.ModuleList(MiMoMTPLayer(config, first + index) for index in range(config.num_nextn_predict_layers))
        self.post_init()


class MiMoForCausalLM(Qwen2ForCausalLM):
    """A Qwen2 language model; its MTP layers are weights that only drafting and their own training run."""

    config_class = MiMoConfig
    config: MiMoConfig

    def __init__(self, config: MiMoConfig) -> None:
        super().__init__(config)
        self.model = MiMoModel(config)
        self.post_init()


def mtp_layers(config: MiMoConfig) -> tuple[list[MiMoMTPLayer], Qwen2RotaryEmbedding]:
    """See `runner.models.family.MtpLayers.build`."""
    first = config.num_hidden_layers
    layers = [MiMoMTPLayer(config, first + index) for index in range(config.num_nextn_predict_layers)]
    return layers, Qwen2RotaryEmbedding(config)


def register() -> None:
    """Let AutoConfig and AutoModelForCausalLM build `model_type: mimo`; may be called again."""
    AutoConfig.register("mimo", MiMoConfig, exist_ok=True)
    AutoModelForCausalLM.register(MiMoConfig, MiMoForCausalLM, exist_ok=True)
