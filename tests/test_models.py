"""The parameter tables against transformers' modules and against published sizes; tokenizer; disk <-> memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import BASE, MLA, MOE
from transformers import AutoTokenizer

from runner.config.schema import Convention, ModelConfig, Role
from runner.convert.engine import convert
from runner.errors import UserError
from runner.models import FAMILIES, family_of, num_parameters
from runner.models import build as build_module
from runner.models.build import (
    build_model,
    build_structure,
    disk_tensors,
    memory_tensors,
    memory_view,
    named_weights,
    save_config,
)
from runner.models.tokenizer import byte_tokenizer, load_tokenizer
from runner.models.vocabulary import EOS_ID, FIRST_BYTE_ID, PAD_ID, SPECIAL_TOKENS, VOCAB_SIZE
from runner.precision import codec
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat

SMALL = BASE | {"hidden_size": 32, "ffn_size": 96, "vocab_size": VOCAB_SIZE, "initializer_range": 0.02}


def make(name: str, family: str, **fields: Any) -> ModelConfig:
    return ModelConfig(**(SMALL | {"name": name, "family": family} | fields))


TINY = {
    model.name: model
    for model in (
        make("dense", "qwen3"),
        make("dense_tied_bias", "qwen3", tied_embeddings=True, attention_bias=True),
        make("moe", "qwen3_moe", **MOE),
        make("moe_dense_first", "qwen3_moe", **MOE, num_dense_layers=1),
        make("moonlight_like", "deepseek", **(MOE | MLA)),
        make("kimi_like", "deepseek", **(MOE | MLA), q_lora_rank=24, num_layers=3),
        make("deepseek_bias", "deepseek", **(MOE | MLA), q_lora_rank=24, attention_bias=True),
        make("mimo", "mimo", qk_norm=False, attention_bias=True, num_mtp_layers=1, head_dim=8),
        make("vision", "qwen3_vl", vision=True),
    )
}


@pytest.fixture(params=TINY.values(), ids=TINY.keys())
def tiny(request: pytest.FixtureRequest) -> ModelConfig:
    return request.param


def build(model: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return build_model(model, dtype=dtype, seed=seed)


def test_table_equals_what_transformers_saves(tiny: ModelConfig, tmp_path: Path) -> None:
    """Names and shapes of every tensor on disk, and which ones the table says are stacked in memory."""
    built = build(tiny)
    built.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        on_disk = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    table = {parameter.name: parameter.shape for parameter in family_of(tiny).parameters(tiny)}
    assert on_disk == table
    views = dict(disk_tensors(family_of(tiny), tiny, named_weights(tiny, built)))
    assert views.keys() == saved.keys()
    assert all(torch.equal(views[name], saved[name]) for name in saved)


def test_table_has_no_duplicates_and_layers_and_experts_are_set(tiny: ModelConfig) -> None:
    parameters = list(family_of(tiny).parameters(tiny))
    assert len({parameter.name for parameter in parameters}) == len(parameters)
    for parameter in parameters:
        assert (parameter.role is Role.routed_expert) == (parameter.expert is not None)
        if ".layers." in parameter.name and ".visual." not in parameter.name:
            assert parameter.layer == int(parameter.name.split(".layers.")[1].split(".")[0])
        if parameter.expert is not None:
            assert f".experts.{parameter.expert}." in parameter.name
    experts_in = {parameter.layer for parameter in parameters if parameter.role is Role.routed_expert}
    assert sorted(experts_in) == family_of(tiny).moe_layers(tiny)


def test_roles_follow_what_a_weight_does() -> None:
    roles = {parameter.name: parameter.role for parameter in FAMILIES["deepseek"].parameters(TINY["kimi_like"])}
    assert roles["model.layers.1.mlp.gate.weight"] is Role.router
    assert roles["model.layers.1.mlp.gate.e_score_correction_bias"] is Role.router
    assert roles["model.layers.0.mlp.gate_proj.weight"] is Role.dense_mlp
    assert roles["model.layers.1.mlp.shared_experts.up_proj.weight"] is Role.shared_expert
    assert roles["model.layers.1.mlp.experts.3.down_proj.weight"] is Role.routed_expert
    assert roles["model.layers.1.self_attn.kv_a_layernorm.weight"] is Role.norm
    assert roles["model.layers.1.self_attn.kv_b_proj.weight"] is Role.attention
    mimo = {parameter.name: parameter.role for parameter in FAMILIES["mimo"].parameters(TINY["mimo"])}
    assert {role for name, role in mimo.items() if "mtp_layers" in name} == {Role.mtp}
    vision = {parameter.name: parameter.role for parameter in FAMILIES["qwen3_vl"].parameters(TINY["vision"])}
    assert {role for name, role in vision.items() if ".visual." in name} == {Role.vision}


def test_views_share_memory_and_restacking_is_exact(tiny: ModelConfig) -> None:
    built = build(tiny)
    family, memory = family_of(tiny), dict(named_weights(tiny, built))
    views = memory_view(family, tiny, memory)
    storages = {tensor.untyped_storage().data_ptr() for tensor in memory.values()}
    assert all(view.untyped_storage().data_ptr() in storages for view in views.values())
    rebuilt = dict(memory_tensors(family, tiny, {name: view.clone() for name, view in views.items()}))
    assert rebuilt.keys() == memory.keys()
    assert all(torch.equal(rebuilt[name], memory[name]) for name in memory)
    for view in views.values():
        view.fill_(0.5)
    assert all(bool((tensor == 0.5).all()) for tensor in built.state_dict().values())


def test_a_missing_expert_is_named() -> None:
    model = TINY["moe"]
    disk = {parameter.name: torch.zeros(parameter.shape) for parameter in family_of(model).parameters(model)}
    del disk["model.layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(KeyError, match=r"layers\.1\.mlp\.experts\.2\.up_proj"):
        dict(memory_tensors(family_of(model), model, disk))


def test_config_json_round_trip(tiny: ModelConfig, tmp_path: Path) -> None:
    """What transformers writes for our config reads back as the same architecture numbers."""
    save_config(tiny, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    fields = family_of(tiny).from_hf_config(config, tiny.name)
    assert {key: getattr(tiny, key) for key in fields} == fields
    assert fields.keys() == ModelConfig.__dataclass_fields__.keys() - {
        "hf_checkpoint",
        "toy_twin",
        "int4_group_size",
    }


def test_config_json_that_is_not_understood_is_named() -> None:
    family = FAMILIES["deepseek"]
    config = family.hf_config(TINY["kimi_like"])
    with pytest.raises(ValueError, match="n_group"):
        family.from_hf_config(config | {"n_group": None}, "grouped")
    assert family.from_hf_config({k: v for k, v in config.items() if k != "n_group"}, "grouped")["expert_groups"] == 8
    del config["kv_lora_rank"]
    with pytest.raises(ValueError, match="kv_lora_rank"):
        family.from_hf_config(config, "incomplete")


@pytest.mark.parametrize(
    ("billions", "fields"),
    [
        (
            4.022,
            {
                "family": "qwen3",
                "num_layers": 36,
                "hidden_size": 2560,
                "ffn_size": 9728,
                "num_heads": 32,
                "num_kv_heads": 8,
                "head_dim": 128,
                "vocab_size": 151936,
                "tied_embeddings": True,
            },
        ),
        (
            30.532,
            {
                "family": "qwen3_moe",
                "num_layers": 48,
                "hidden_size": 2048,
                "ffn_size": 6144,
                "num_heads": 32,
                "num_kv_heads": 4,
                "head_dim": 128,
                "vocab_size": 151936,
                "num_experts": 128,
                "expert_ffn_size": 768,
            },
        ),
        (
            235.094,
            {
                "family": "qwen3_moe",
                "num_layers": 94,
                "hidden_size": 4096,
                "ffn_size": 12288,
                "num_heads": 64,
                "num_kv_heads": 4,
                "head_dim": 128,
                "vocab_size": 151936,
                "num_experts": 128,
                "expert_ffn_size": 1536,
            },
        ),
        (
            15.960,
            {
                "family": "deepseek",
                "num_layers": 27,
                "hidden_size": 2048,
                "ffn_size": 11264,
                "num_heads": 16,
                "vocab_size": 163840,
                "num_experts": 64,
                "expert_ffn_size": 1408,
                "num_shared_experts": 2,
                "num_dense_layers": 1,
                "router_bias": True,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
            },
        ),
        (
            1026.408,
            {
                "family": "deepseek",
                "num_layers": 61,
                "hidden_size": 7168,
                "ffn_size": 18432,
                "num_heads": 64,
                "vocab_size": 163840,
                "num_experts": 384,
                "expert_ffn_size": 2048,
                "num_shared_experts": 1,
                "num_dense_layers": 1,
                "router_bias": True,
                "q_lora_rank": 1536,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
            },
        ),
        (
            7.833,
            {
                "family": "mimo",
                "num_layers": 36,
                "hidden_size": 4096,
                "ffn_size": 11008,
                "num_heads": 32,
                "num_kv_heads": 8,
                "head_dim": 128,
                "vocab_size": 151680,
                "attention_bias": True,
                "qk_norm": False,
                "num_mtp_layers": 1,
            },
        ),
    ],
    ids=["qwen3_4b", "qwen3_30b", "qwen3_235b", "moonlight_16b", "kimi_k2", "mimo_7b"],
)
def test_published_sizes(billions: float, fields: dict[str, Any]) -> None:
    model = ModelConfig(**(SMALL | {"name": "published"} | fields))
    assert num_parameters(model) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_random_start_depends_on_the_seed_alone() -> None:
    model = TINY["moe"]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = dict(build(model, seed=3).state_dict())
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = dict(build(model, seed=3).state_dict()), dict(build(model, seed=4).state_dict())
    half = dict(build(model, seed=3, dtype=torch.bfloat16).state_dict())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(first[name], again[name]) and torch.equal(first[name].bfloat16(), half[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_device_of_its_own_draws_every_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, on a CPU: all memory that the draw does not reach is NaN."""
    model, cpu = TINY[name], torch.device("cpu")
    auto_class, kernels = build_module._choices(model, family_of(model), "sdpa", "grouped_mm")
    drawn = []
    for seed in (3, 3, 4):
        built = build_module._unwritten(auto_class, build_module.checkpoint_config(model), torch.float32, cpu, kernels)
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.fill_(float("nan"))
        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        drawn.append(dict(build_module._drawn(built, seed, cpu).state_dict()))
        assert torch.equal(torch.random.get_rng_state(), before)
    usual = dict(build(model, seed=3).state_dict())
    assert usual.keys() == drawn[0].keys()
    for weight, expected in usual.items():
        assert bool(drawn[0][weight].isfinite().all()), weight
        assert torch.equal(drawn[0][weight], drawn[1][weight])
        spread, other = drawn[0][weight].std(), drawn[2][weight]
        if weight.endswith("weight") and expected.dim() > 1:
            assert float(spread) == pytest.approx(float(expected.std()), rel=0.2) and not torch.equal(drawn[0][weight], other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(TINY))
def test_a_structure_is_the_model_without_its_weights(name: str, dtype: torch.dtype) -> None:
    model = TINY[name]
    whole = build(model, dtype=dtype)
    bare = build_structure(model, dtype=dtype, device=torch.device("cpu"), attention="sdpa", experts="grouped_mm")
    assert [(n, t.shape, t.dtype) for n, t in bare.state_dict().items()] == [
        (n, t.shape, t.dtype) for n, t in whole.state_dict().items()
    ]
    assert not bare.training
    if model.tied_embeddings:
        assert bare.get_output_embeddings().weight is bare.get_input_embeddings().weight
    kept = dict(bare.named_buffers())
    assert all(torch.equal(kept[n], buffer) for n, buffer in whole.named_buffers() if n not in bare.state_dict())


@pytest.mark.parametrize("name", ["moe", "kimi_like", "mimo", "dense", "vision"])
def test_models_run_forward_and_backward(name: str) -> None:
    built = build(TINY[name])
    logits = built(input_ids=torch.arange(16, 40).reshape(2, 12)).logits
    assert logits.shape == (2, 12, VOCAB_SIZE) and bool(torch.isfinite(logits).all())
    logits.square().mean().backward()
    queries = [p for n, p in built.named_parameters() if ".0.self_attn.q" in n and "mtp" not in n and "proj" in n]
    assert queries and all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in queries)


def test_mtp_layer_draft_depends_on_the_next_token() -> None:
    built = build(TINY["mimo"])
    tokens = torch.arange(16, 28).reshape(1, 12)
    hidden = built.model(input_ids=tokens).last_hidden_state
    rope = built.model.rotary_emb(hidden, torch.arange(11).unsqueeze(0))
    embed = built.model.embed_tokens
    layer = built.model.mtp_layers[0]
    draft = layer(hidden[:, :-1], embed(tokens[:, 1:]), rope)
    assert draft.shape == (1, 11, 32)
    changed = tokens.clone()
    changed[0, 8] = 99  # the token that follows position 7
    other = layer(hidden[:, :-1], embed(changed[:, 1:]), rope)
    assert torch.equal(draft[:, :7], other[:, :7]) and not torch.equal(draft[:, 7], other[:, 7])


def test_checkpoint_loads_and_wrong_numbers_are_named(tmp_path: Path) -> None:
    model = TINY["moe"]
    original = build(model, seed=5)
    original.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    from_disk = make("moe", "qwen3_moe", **MOE, hf_checkpoint=str(tmp_path))
    loaded = build(from_disk, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(original.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert len(load_tokenizer(from_disk)) == VOCAB_SIZE
    with pytest.raises(UserError, match="expert"):
        build(make("moe", "qwen3_moe", **(MOE | {"expert_ffn_size": 128}), hf_checkpoint=str(tmp_path)))
    with pytest.raises(UserError, match="Qwen3MoeForCausalLM"):
        build(make("moe", "qwen3", hf_checkpoint=str(tmp_path)))


@pytest.mark.parametrize("kind", ["int4", "fp8", "nvfp4"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_quantized_checkpoint_starts_as_its_dequantized_weights(tmp_path: Path, family: str, kind: str) -> None:
    """In any family and format, although transformers keeps some packed and computes others wrongly."""
    sizes = MOE if family == "qwen3_moe" else {}
    original = make("tiny", family, **sizes)
    built = build(original)
    buffers = {name: buffer.tolist() for name, buffer in built.named_buffers()}
    built.bfloat16().save_pretrained(tmp_path / "bf16")
    byte_tokenizer().save_pretrained(tmp_path / "bf16")
    weights = dict(disk_tensors(family_of(original), original, named_weights(original, built)))
    tensor_format = {"int4": TensorFormat.int4(32, Convention.kimi), "fp8": TensorFormat.fp8(), "nvfp4": TensorFormat.nvfp4()}[
        kind
    ]
    roles = {Role.routed_expert if sizes else Role.dense_mlp}
    convert(tmp_path / "bf16", tmp_path / kind, tensor_format, lambda _: roles, workers=1)
    started = make("tiny", family, **sizes, hf_checkpoint=str(tmp_path / kind))
    from_disk = build(started)
    assert {name: buffer.tolist() for name, buffer in from_disk.named_buffers()} == buffers
    loaded = dict(disk_tensors(family_of(started), started, named_weights(started, from_disk)))
    plan = PrecisionPlan.with_format(original, tensor_format, roles)
    assert loaded.keys() == weights.keys()
    for exported in codec.encode_all(weights.items(), plan):
        assert torch.equal(loaded[exported.name], codec.decode(exported, plan.tensors[exported.name]).float()), exported.name
    save_config(started, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_unreadable_checkpoint_is_a_user_error(tmp_path: Path) -> None:
    for what in (build, load_tokenizer):
        with pytest.raises(UserError, match="cannot load"):
            what(make("moe", "qwen3_moe", **MOE, hf_checkpoint=str(tmp_path / "nothing")))


def test_unknown_family_says_which_was_meant() -> None:
    with pytest.raises(UserError, match="qwen3_moe"):
        family_of(make("x", "qwen3_mo"))
    with pytest.raises(UserError, match="deepseek"):
        family_of(make("x", "zzzzz"))


def test_tables_need_no_torch() -> None:
    code = "import sys, runner.models; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tokenizer_round_trips_any_text_with_fixed_ids(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for candidate in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(candidate) == VOCAB_SIZE and VOCAB_SIZE % 16 == 0
        assert candidate.pad_token_id == PAD_ID and candidate.eos_token_id == EOS_ID
        for text in ("12+345=357\n", "It’s £5 — “ok” \t\u00e9\u4e2d\U0001f600", "".join(map(chr, range(128))), "  two  spaces  "):
            ids = candidate(text).input_ids
            assert ids == [FIRST_BYTE_ID + byte for byte in text.encode()]
            assert candidate.decode(ids) == text
        assert candidate.decode([EOS_ID, FIRST_BYTE_ID + 65], skip_special_tokens=True) == "A"
        assert candidate.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(FIRST_BYTE_ID))
        assert candidate.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_small_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="272"):
        load_tokenizer(make("moe", "qwen3_moe", **MOE, vocab_size=128))
