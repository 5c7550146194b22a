"""The layer specs of both devices: Transformer Engine's on CUDA, Megatron's local ones with classes of our own on a CPU.

Shape legend: T packed tokens of this context-parallel rank, N heads, G key-value heads, D query/key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from runner.trainer.attention import attention_with_sinks, plain_causal_attention


class RmsNorm(nn.RMSNorm):
    """WrappedTorchNorm refuses sequence parallelism; this one marks its weight, whose gradient is then summed over tp."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As transformers computes it: normalised in fp32, rounded, then scaled."""
        wide = x.float()
        normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + float(self.eps or 0.0))
        return self.weight * normalised.to(x.dtype)


class DuplicatedLinear(nn.Module):
    """A linear that every tensor-parallel rank holds whole, in the place of Transformer Engine's for MLA's down projections.

    With Megatron's column-parallel one the rope part of the key gets the gradient of a rank's own heads only.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Any, **kwargs: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return nn.functional.linear(x, self.weight), None


class PackedCausalAttention(nn.Module):
    """Causal attention over packed sequences on a CPU, with any value width (MLA) and context parallelism.

    Megatron's local attention takes neither packed sequences, nor MLA's widths, nor context parallelism. `softmax_offset` are
    attention sinks [N], and what of them a tensor-parallel rank has, under the name that Megatron gives them. With cp > 1
    queries, keys and values are gathered over the context-parallel ranks (zig-zag layout, as Transformer Engine's)
    and each rank keeps its own rows: simple, not fast; a GPU runs Transformer Engine's ring attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.window: int | None = None
        if config.window_size and config.window_attn_skip_freq[layer_number - 1]:
            self.window = config.window_size[0] + 1
        self.softmax_offset: nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams,
        **kwargs: Any,
    ) -> torch.Tensor:
        """query [T, N, D], key [T, G, D], value [T, G, V] -> [T, N * V]."""
        layout: PackedLayout = packed_seq_params.layout
        group = parallel_state.get_context_parallel_group()
        q, k, v = query, key, value
        if group.size() > 1:
            q, k, v = (gather_from_sequence_parallel_region(x, group=group)[layout.from_ranks] for x in (q, k, v))
        # [T, heads, width] -> [samples, heads, longest, width]
        q, k, v = (x[layout.pad].transpose(1, 2) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        if self.softmax_offset is None:
            assert self.window is None, "a window without sinks"
            output = plain_causal_attention(q, k, v, scale)
        else:
            output = attention_with_sinks(q, k, v, scale, self.softmax_offset, self.window)
        packed = output.transpose(1, 2).flatten(0, 1)[layout.unpad]  # [T, N, V]
        return packed.flatten(1)


class ExpertOutput(RowParallelLinear):
    """The second matrix of an expert with a bias, which Megatron adds to its output in place: without ranks to sum over that is a
    view of a custom function's, where autograd forbids it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(x)
        return output.clone(), bias


class PackedLayout:
    """Index tensors of one packed micro-batch, for attention that works on padded samples.

    pad          [samples, longest] index into the packed tokens (of all cp ranks, in order); padding repeats token 0
    unpad        [T] index into samples * longest of every token of THIS cp rank
    from_ranks   [all tokens] index into the concatenation of all cp ranks' tokens that puts them in order
    """

    def __init__(self, lengths: list[int], cp_rank: int, cp_size: int) -> None:
        longest = max(lengths)
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).unsqueeze(1)
        place = torch.arange(longest).unsqueeze(0)
        inside = place < torch.tensor(lengths).unsqueeze(1)
        self.pad = torch.where(inside, starts + place, 0)
        unpad = inside.flatten().nonzero().squeeze(1)
        rows = [local_rows(lengths, rank, cp_size) for rank in range(cp_size)]
        self.from_ranks = torch.cat(rows).argsort()
        self.unpad = unpad[rows[cp_rank]]


def local_rows(lengths: list[int], cp_rank: int, cp_size: int) -> torch.Tensor:
    """Positions in the packed tokens that one context-parallel rank holds: of 2 * cp chunks of every sequence, chunk r and
    chunk 2 * cp - 1 - r (the zig-zag that balances causal attention). Lengths are multiples of 2 * cp."""
    if cp_size == 1:
        return torch.arange(sum(lengths))
    rows, start = [], 0
    for length in lengths:
        chunks = torch.arange(start, start + length).chunk(2 * cp_size)
        rows += [chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]]
        start += length
    return torch.cat(rows)


def decoder_spec(config: TransformerConfig, *, cuda: bool, output_bias: bool = False) -> TransformerBlockSubmodules:
    """The decoder layers that this pipeline stage builds. `output_bias`: the attention's output projection has a bias (Qwen3
    with attention_bias), which Megatron gives to all linear layers or to none."""
    spec = _transformer_engine_spec(config) if cuda else _local_spec(config)
    assert spec.layer_specs is not None
    for layer in spec.layer_specs if output_bias else ():
        attention = layer.submodules.self_attention.submodules
        attention.linear_proj = _with_bias(attention.linear_proj)
    return spec


def _with_bias(linear: Any) -> Any:
    class WithBias(linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"bias": True})

    return WithBias


def _transformer_engine_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    return get_gpt_decoder_block_spec(config, use_transformer_engine=True, normalization="RMSNorm")


def _local_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    assert spec.layer_specs is not None
    multi_latent_attention.TELinear = DuplicatedLinear  # the class it builds with parallel_mode="duplicated"
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = RmsNorm
        layer.submodules.pre_mlp_layernorm = RmsNorm
        if config.num_moe_experts and config.add_bias_linear:
            layer.submodules.mlp.submodules.experts.submodules.linear_fc2 = ExpertOutput
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedCausalAttention
        for down in ("linear_q_down_proj", "linear_kv_down_proj"):
            if hasattr(attention, down):
                setattr(attention, down, DuplicatedLinear)
        for norm in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(attention, norm, IdentityOp) not in (None, IdentityOp):
                setattr(attention, norm, RmsNorm)
    spec.layer_norm = RmsNorm
    return spec
