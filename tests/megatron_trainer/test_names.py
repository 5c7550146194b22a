"""HF <-> Megatron names and shards, without Megatron: runs in `make test`."""

from __future__ import annotations

import pytest
import torch

from runner.config.schema import ModelConfig
from runner.models import family_of
from runner.trainer.megatron import names
from tests.megatron_trainer.configs import MODELS


def _model(name: str) -> ModelConfig:
    return ModelConfig(**MODELS[name])  # type: ignore[arg-type]


def _dim(entry: names.Mapped) -> int | None:
    """The divided dimension, as Megatron's modules mark it."""
    if entry.vocabulary or entry.kind is not names.Kind.direct:
        return 0
    if entry.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return 1
    return 0 if entry.name.endswith(("linear_q_proj.weight", "up_proj.weight")) else None


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_shards_come_back_as_the_tensors_they_were(name: str, size: int) -> None:
    model = _model(name)
    parameters = {p.name: p for p in family_of(model).parameters(model)}
    generator = torch.Generator().manual_seed(0)
    seen: set[str] = set()
    for entry in names.table(model, family_of(model)).values():
        tensors = [torch.randn(parameters[hf].shape, generator=generator) for hf in entry.hf]
        shards = [names.to_shard(entry, tensors, model, _dim(entry), rank, size) for rank in range(size)]
        back = names.to_hf(entry, shards, model, _dim(entry))
        assert list(back) == list(entry.hf)
        assert all(torch.equal(back[hf], tensor) for hf, tensor in zip(entry.hf, tensors, strict=True)), entry.name
        assert not seen & set(entry.hf)
        seen |= set(entry.hf)
    assert seen | set(names.passengers(model, family_of(model))) == parameters.keys()
    assert all(".mtp_layers." in hf for hf in names.passengers(model, family_of(model)))


def test_a_query_group_stays_together() -> None:
    """4 query heads, 2 key-value heads: Megatron wants q0 q1 k0 v0 q2 q3 k1 v1, and shard 1 holds the second group."""
    model = _model("dense")
    entry = names.table(model, family_of(model))["decoder.layers.0.self_attention.linear_qkv.weight"]
    width = model.head_dim
    q = torch.arange(4).repeat_interleave(width).unsqueeze(1).float()
    k, v = q[: 2 * width] + 10, q[: 2 * width] + 20
    shard = names.to_shard(entry, [q, k, v], model, 0, 1, 2)
    assert shard[::width, 0].tolist() == [2, 3, 11, 21]


def test_the_vocabulary_is_padded_to_the_ranks() -> None:
    model = _model("dense")
    model.vocab_size = 273
    entry = names.table(model, family_of(model))["embedding.word_embeddings.weight"]
    weight = torch.randn(273, 8)
    shards = [names.to_shard(entry, [weight], model, 0, rank, 2) for rank in range(2)]
    assert shards[1].shape == (137, 8) and not shards[1][-1].any()
    assert torch.equal(names.to_hf(entry, shards, model, 0)["model.embed_tokens.weight"], weight)


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        ("layers.1.input_layernorm.weight", "layers.5.input_layernorm.weight"),
        ("layers.0.self_attention.linear_qkv.layer_norm_weight", "layers.4.input_layernorm.weight"),
        ("layers.0.mlp.linear_fc1.layer_norm_weight", "layers.4.pre_mlp_layernorm.weight"),
        ("layers.0.self_attention.linear_kv_up_proj.layer_norm_weight", "layers.4.self_attention.kv_layernorm.weight"),
        ("layers.0.mlp.experts.linear_fc1.weight3", "layers.4.mlp.experts.local_experts.11.linear_fc1.weight"),
        ("layers.0.mlp.experts.local_experts.3.linear_fc2.weight", "layers.4.mlp.experts.local_experts.11.linear_fc2.weight"),
        ("layers.0.mlp.shared_experts.linear_fc1.weight", "layers.4.mlp.shared_experts.linear_fc1.weight"),
        ("final_layernorm.weight", "final_layernorm.weight"),
    ],
)
def test_names_of_both_layer_specs_are_global(local: str, expected: str) -> None:
    assert names.canonical(f"decoder.{local}", first_layer=4, first_expert=8) == f"decoder.{expected}"
