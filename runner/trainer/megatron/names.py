"""HF <-> Megatron: the names, and how an HF weight lies in a Megatron parameter and in its tensor-parallel shards.

A Megatron name here is global: `decoder.layers.<layer of the whole model>`, `experts.local_experts.<expert of the whole
model>`, as the local layer spec spells it. Transformer Engine's spec fuses norms into the linear behind them and numbers
expert weights; `canonical` translates its names.

Shape legend: G key-value heads, Q query heads per key-value head, D head width, H hidden, F ffn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from runner.config.schema import ModelConfig
from runner.models.family import Family


class Kind(Enum):
    direct = "direct"  # one HF tensor, as it is
    gate_up = "gate_up"  # gate rows, then up rows; a shard holds its part of both
    qkv = "qkv"  # for each key-value head: its query heads, its key, its value


@dataclass(frozen=True)
class Mapped:
    """A Megatron parameter and the HF tensors in it. `vocabulary`: rows may be padded up to a multiple of tp."""

    name: str
    kind: Kind
    hf: tuple[str, ...]
    vocabulary: bool = False

    @property
    def expert(self) -> bool:
        return ".experts." in self.name


def table(model: ModelConfig, family: Family) -> dict[str, Mapped]:
    """Global Megatron name -> what lies there, for every HF tensor of the model except multi-token-prediction layers."""
    disk = {parameter.name for parameter in family.parameters(model)}
    entries = [entry for entry in _entries(model, family) if set(entry.hf) <= disk]
    return {entry.name: entry for entry in entries}


def output_bias(model: ModelConfig, family: Family) -> bool:
    """Whether the attention's output projection has a bias."""
    return any(name.endswith(".self_attention.linear_proj.bias") for name in table(model, family))


def passengers(model: ModelConfig, family: Family) -> list[str]:
    """HF tensors that no Megatron parameter holds: multi-token-prediction layers, which the policy never runs."""
    carried = {name for entry in table(model, family).values() for name in entry.hf}
    return [parameter.name for parameter in family.parameters(model) if parameter.name not in carried]


def _entries(model: ModelConfig, family: Family) -> Iterator[Mapped]:
    yield Mapped("embedding.word_embeddings.weight", Kind.direct, ("model.embed_tokens.weight",), vocabulary=True)
    moe = set(family.moe_layers(model))
    for layer in range(model.num_layers):
        hf, mega = f"model.layers.{layer}", f"decoder.layers.{layer}"
        yield Mapped(f"{mega}.input_layernorm.weight", Kind.direct, (f"{hf}.input_layernorm.weight",))
        yield Mapped(f"{mega}.pre_mlp_layernorm.weight", Kind.direct, (f"{hf}.post_attention_layernorm.weight",))
        yield from _attention(model, f"{hf}.self_attn", f"{mega}.self_attention")
        if layer not in moe:
            yield from _mlp(f"{hf}.mlp", f"{mega}.mlp")
            continue
        for gate in ("mlp.gate", "mlp.router", "block_sparse_moe.gate"):  # `table` leaves out what the family does not have
            yield Mapped(f"{mega}.mlp.router.weight", Kind.direct, (f"{hf}.{gate}.weight",))
        yield Mapped(f"{mega}.mlp.router.bias", Kind.direct, (f"{hf}.mlp.router.bias",))
        yield Mapped(f"{mega}.mlp.router.expert_bias", Kind.direct, (f"{hf}.mlp.gate.e_score_correction_bias",))
        for expert in range(model.num_experts):
            ours = f"{mega}.mlp.experts.local_experts.{expert}"
            yield from _mlp(f"{hf}.mlp.experts.{expert}", ours)
            yield from _mlp(f"{hf}.block_sparse_moe.experts.{expert}", ours, ("w1", "w3", "w2"))
        for shared in ("shared_experts", "shared_expert"):
            yield from _mlp(f"{hf}.mlp.{shared}", f"{mega}.mlp.shared_experts")
        yield Mapped(f"{mega}.mlp.shared_experts.gate_weight", Kind.direct, (f"{hf}.mlp.shared_expert_gate.weight",))
    yield Mapped("decoder.final_layernorm.weight", Kind.direct, ("model.norm.weight",))
    yield Mapped("output_layer.weight", Kind.direct, ("lm_head.weight",), vocabulary=True)


def _attention(model: ModelConfig, hf: str, mega: str) -> Iterator[Mapped]:
    if model.kv_lora_rank:
        for ours, theirs in (
            ("linear_q_proj.weight", "q_proj.weight"),
            ("linear_q_down_proj.weight", "q_a_proj.weight"),
            ("linear_q_up_proj.weight", "q_b_proj.weight"),
            ("q_layernorm.weight", "q_a_layernorm.weight"),
            ("linear_kv_down_proj.weight", "kv_a_proj_with_mqa.weight"),
            ("kv_layernorm.weight", "kv_a_layernorm.weight"),
            ("linear_kv_up_proj.weight", "kv_b_proj.weight"),
            ("linear_proj.weight", "o_proj.weight"),
        ):
            yield Mapped(f"{mega}.{ours}", Kind.direct, (f"{hf}.{theirs}",))
        return
    for what in ("weight", "bias"):
        yield Mapped(f"{mega}.linear_qkv.{what}", Kind.qkv, tuple(f"{hf}.{x}_proj.{what}" for x in "qkv"))
        yield Mapped(f"{mega}.linear_proj.{what}", Kind.direct, (f"{hf}.o_proj.{what}",))
    yield Mapped(f"{mega}.core_attention.softmax_offset", Kind.direct, (f"{hf}.sinks",))
    for norm in "qk":
        yield Mapped(f"{mega}.{norm}_layernorm.weight", Kind.direct, (f"{hf}.{norm}_norm.weight",))


def _mlp(hf: str, mega: str, projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Iterator[Mapped]:
    for what in ("weight", "bias"):
        gate, up, down = (f"{hf}.{projection}.{what}" for projection in projections)
        yield Mapped(f"{mega}.linear_fc1.{what}", Kind.gate_up, (gate, up))
        yield Mapped(f"{mega}.linear_fc2.{what}", Kind.direct, (down,))


_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_TE_EXPERT = re.compile(r"\.experts\.linear_fc([12])\.weight(\d+)$")
_TE_NORMS = (
    (".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight"),
    (".self_attention.linear_q_up_proj.layer_norm_weight", ".self_attention.q_layernorm.weight"),
    (".self_attention.linear_kv_up_proj.layer_norm_weight", ".self_attention.kv_layernorm.weight"),
    (".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight"),
)


def canonical(name: str, first_layer: int, first_expert: int) -> str:
    """The global name, spelt as the local spec does, of a parameter `name` of a rank whose first layer and expert these are."""
    name = _TE_EXPERT.sub(lambda m: f".experts.local_experts.{m[2]}.linear_fc{m[1]}.weight", name)
    for theirs, ours in _TE_NORMS:
        name = name.replace(theirs, ours)
    name = _LAYER.sub(lambda m: f"decoder.layers.{int(m[1]) + first_layer}.", name)
    return _EXPERT.sub(lambda m: f".local_experts.{int(m[1]) + first_expert}.", name)


def to_shard(
    entry: Mapped, tensors: Sequence[torch.Tensor], model: ModelConfig, dim: int | None, rank: int, size: int
) -> torch.Tensor:
    """HF tensors -> one tensor-parallel shard. `dim` is the divided dimension of the parameter; None: every rank holds it all."""
    if entry.kind is Kind.gate_up:
        pieces = [tensor if dim is None else tensor.chunk(size, 0)[rank] for tensor in tensors]
        return torch.cat(pieces)
    whole = tensors[0] if entry.kind is Kind.direct else _interleave(tensors, model)
    if dim is None:
        return whole
    if entry.vocabulary:
        rows = -(-whole.shape[0] // size) * size
        whole = torch.nn.functional.pad(whole, (0, 0, 0, rows - whole.shape[0]))
    return whole.chunk(size, dim)[rank]


def to_hf(entry: Mapped, shards: Sequence[torch.Tensor], model: ModelConfig, dim: int | None) -> dict[str, torch.Tensor]:
    """All tensor-parallel shards, in rank order (one of them where dim is None) -> HF name -> tensor."""
    if entry.kind is Kind.gate_up:
        halves = [shard.chunk(2, 0) for shard in shards]
        return {name: torch.cat([half[i] for half in halves]) for i, name in enumerate(entry.hf)}
    whole = shards[0] if dim is None or len(shards) == 1 else torch.cat(list(shards), dim=dim)
    if entry.vocabulary:
        whole = whole[: model.vocab_size]
    return dict(zip(entry.hf, separate(entry, whole, model), strict=True))


def separate(entry: Mapped, shard: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """A parameter, or one shard of it [rows, ...] -> its rows of every HF tensor in it, in the entry's order."""
    match entry.kind:
        case Kind.direct:
            return [shard]
        case Kind.gate_up:
            return list(shard.chunk(2, 0))
        case Kind.qkv:
            width = model.head_dim
            rest, sizes = shard.shape[1:], [model.num_heads // model.num_kv_heads * width, width, width]
            return [x.reshape(-1, *rest) for x in shard.reshape(-1, sum(sizes), *rest).split(sizes, dim=1)]


def join(entry: Mapped, pieces: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Inverse of `separate`."""
    return _interleave(pieces, model) if entry.kind is Kind.qkv else torch.cat(list(pieces))


def _interleave(qkv: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """q [G * Q * D, ...], k and v [G * D, ...] -> [G * (Q + 2) * D, ...], also for biases and shards (fewer G)."""
    groups = qkv[1].shape[0] // model.head_dim
    rest = qkv[0].shape[1:]
    return torch.cat([x.reshape(groups, -1, *rest) for x in qkv], dim=1).reshape(-1, *rest)
