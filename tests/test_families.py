"""Every kind of config.json that a family may meet: read right by trainer and engine, or refused with its key."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert_sources import model, read_all, write_source
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from runner.config import compose, rules
from runner.config.choices import RouterScore
from runner.config.schema import Convention, ModelConfig, Role
from runner.convert.compare import audit_checkpoint
from runner.convert.engine import convert
from runner.errors import UserError, UserErrors
from runner.models import FAMILIES, Family, agreement, family_of
from runner.models.build import build_model, save_config
from runner.models.families import qwen3_vl
from runner.models.images import image_processor
from runner.models.published import checkpoint_config
from runner.models.tokenizer import byte_tokenizer
from runner.models.visual import hidden_states
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat
from runner.rollout.local.attention import ATTENTION, KVCache
from runner.rollout.local.model import EngineModel
from runner.routing.replay import RouterReplay
from runner.trainer import mtp
from tests.configs import MODELS, composed

INT4 = TensorFormat.int4(32, Convention.exact)
PUBLISHED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "published_configs.json").read_text())
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GROUPS: dict[str, Any] = {"num_experts": 8, "experts_top_k": 4, "expert_groups": 4, "expert_groups_top_k": 2}


def folder_of(path: Path, config: ModelConfig, **changes: Any) -> ModelConfig:
    """A checkpoint whose config.json has these changes; the model group that reads it."""
    write_source(path, config, shards=1)
    values = json.loads((path / "config.json").read_text())
    if "rope_scaling" in changes:
        values |= {"rope_theta": values.pop("rope_parameters")["rope_theta"]}
    (path / "config.json").write_text(json.dumps(values | changes))
    return ModelConfig(**(vars(config) | {"hf_checkpoint": str(path)}))


def engine_logits(config: ModelConfig, built: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, EngineModel]:
    """Logits [T, V] of one sequence by the in-process engine, with the weights of `built` (made with attention=ATTENTION)."""
    engine = EngineModel(
        config, PrecisionPlan.with_format(config, TensorFormat.bf16(), ()), torch.float32, torch.device("cpu"), built
    )
    cache = KVCache(1, 64, torch.float32, torch.device("cpu"))
    count = np.array([len(tokens)])
    return engine.logits(engine.forward(cache, tokens.numpy(), np.array([0]), count)), engine


# -- config.json against the model group ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "key", "said"),
    [
        ("qwen3", {"rope_theta": 5e5, "rope_parameters": None}, "model.rope_theta", "rope_theta 500000.0, the model group 10000"),
        ("qwen3", {"rms_norm_eps": 1e-5}, "model.norm_eps", "norm_eps 1e-05"),
        ("qwen3", {"attention_bias": True}, "model.attention_bias", "attention_bias True"),
        ("qwen3", {"tie_word_embeddings": True}, "model.tied_embeddings", "tied_embeddings True"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 0}, "model.hf_checkpoint", "sliding_window"),
        ("qwen3_moe", {"use_sliding_window": True}, "model.hf_checkpoint", "use_sliding_window"),
        ("qwen3", {"hidden_act": "gelu"}, "model.hf_checkpoint", "hidden_act"),
        ("qwen3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "model.hf_checkpoint", "longest sequence of a batch"),
        ("qwen3", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "model.hf_checkpoint", "longest sequence"),
        ("qwen3", {"rope_scaling": {"rope_type": "su"}}, "model.hf_checkpoint", "known: default, linear, yarn, llama3"),
        ("qwen3", {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "model.hf_checkpoint", "another part of a head"),
        ("qwen3_moe", {"norm_topk_prob": False}, "model.hf_checkpoint", "norm_topk_prob"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "model.hf_checkpoint", "decoder_sparse_step"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "model.hf_checkpoint", "mlp_only_layers"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "model.num_dense_layers", "num_dense_layers 1"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "model.experts_top_k", "experts_top_k 1"),
        ("deepseek", {"scoring_func": "softmax"}, "model.hf_checkpoint", "scoring_func"),
        ("deepseek", {"topk_method": "greedy"}, "model.hf_checkpoint", "topk_method"),
        ("deepseek", {"moe_layer_freq": 2}, "model.hf_checkpoint", "moe_layer_freq"),
        ("deepseek", {"norm_topk_prob": False}, "model.hf_checkpoint", "norm_topk_prob"),
        ("deepseek", {"rope_interleave": False}, "model.hf_checkpoint", "rope_interleave"),
        ("deepseek", {"n_group": 2}, "model.expert_groups", "expert_groups 2"),
        ("deepseek", {"routed_scaling_factor": 1.5}, "model.routed_scaling_factor", "routed_scaling_factor 1.5"),
        ("deepseek", {"q_lora_rank": None}, "model.q_lora_rank", "q_lora_rank 0"),
    ],
)  # fmt: skip
def test_what_differs_or_is_not_computed_is_said_before_a_run(
    tmp_path: Path, family: str, changes: dict[str, Any], key: str, said: str
) -> None:
    """By the rules (`plan` too) and by whoever builds the model: transformers reads config.json, Megatron the model group."""
    config = folder_of(tmp_path / "source", model(family), **changes)
    found = list(agreement.problems(config, family_of(config), agreement.local_config(config) or {}))
    assert [error.key for error in found] == [key] and said in str(found[0])
    cfg = composed("precision=bf16")
    cfg.model = config
    assert any(error.key == key and said in str(error) for error in rules.check(cfg))
    with pytest.raises(UserError, match=said.replace("(", r"\(")[:20]):
        build_model(config, dtype=torch.float32, seed=0)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek"])
def test_a_checkpoint_of_the_model_group_is_accepted(tmp_path: Path, family: str) -> None:
    config = folder_of(tmp_path / "source", model(family))
    assert list(agreement.problems(config, family_of(config), agreement.local_config(config) or {})) == []


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_shipped_numbers_are_those_of_the_published_config_json(name: str) -> None:
    """They serve planning without the checkpoint. tests/published_configs.json: what the hub's config.json say of the shape."""
    shipped, published = compose.load([f"model={name}"]).config.model, PUBLISHED[name]
    fields = family_of(shipped).from_hf_config(published, name)
    assert fields == {field: getattr(shipped, field) for field in fields}
    assert set(published["architectures"]) <= set(family_of(shipped).architectures)


def test_every_shipped_checkpoint_is_among_the_published_ones() -> None:
    assert sorted(PUBLISHED) == [name for name in MODELS if not name.startswith("tiny")]


@pytest.mark.parametrize(("group", "family"), [("qwen3_4b", "qwen3"), ("qwen3_30b", "qwen3_moe"), ("moonlight_16b", "deepseek")])
def test_the_numbers_of_a_local_checkpoint_are_taken_from_its_config_json(tmp_path: Path, group: str, family: str) -> None:
    folder = folder_of(tmp_path / "source", model(family))
    chosen = [f"model={group}", f"model.hf_checkpoint={folder.hf_checkpoint}"]
    taken = compose.load(chosen, check_rules=False)
    names = agreement.numbers(folder, family_of(folder), agreement.local_config(folder) or {})
    assert {"num_layers", "hidden_size", "rope_theta", "vocab_size"} <= names.keys()
    assert names == {name: getattr(taken.config.model, name) for name in names} == {name: taken.raw.model[name] for name in names}
    assert taken.config.model.name == group and taken.config.model.hf_checkpoint == folder.hf_checkpoint
    with pytest.raises(UserErrors, match=f"has num_layers {folder.num_layers}, the model group 7"):
        compose.load([*chosen, "model.num_layers=7"])


def test_a_toy_twin_does_not_grow_to_the_size_of_a_checkpoint(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "source", model("qwen3"))
    chosen = ["model=qwen3_4b", f"model.hf_checkpoint={folder.hf_checkpoint}", "scale=laptop"]
    assert (
        compose.load(chosen, check_rules=False).config.model.num_layers
        == compose.load(["model=tiny_dense"]).config.model.num_layers
    )


def test_megatron_refuses_by_rule_what_it_would_compute_otherwise() -> None:
    cfg = compose.load(
        ["model=tiny_mla", "trainer=megatron", "parallelism=cpu2", "parallelism.tp=1", "speculative=none"], check_rules=False
    ).config
    assert not [error for error in rules.check(cfg) if (error.key or "").startswith("model")]
    cfg.model.attention_bias = True
    assert any("latent attention has no biases" in str(error) for error in rules.check(cfg))
    cfg.model.attention_bias, cfg.model.expert_groups, cfg.model.expert_groups_top_k = False, 4, 2
    assert any("the sum of their best 1" in str(error) for error in rules.check(cfg))
    cfg.model.experts_top_k = 4
    assert not [error for error in rules.check(cfg) if (error.key or "").startswith("model")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert_groups": 3}, "8 experts do not make 3 groups"),
        ({"expert_groups": 8}, "do not make 8 groups of 2"),
        ({"expert_groups": 4, "expert_groups_top_k": 5}, "5 of 4 groups"),
        ({"expert_groups": 4, "experts_top_k": 3}, "hold fewer than the 3"),
        ({"family": "qwen3_moe", "expert_groups": 2}, "has no groups of experts"),
    ],
)
def test_groups_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    cfg = compose.load(["model=tiny_mla"], check_rules=False).config
    for name, value in changes.items():
        setattr(cfg.model, name, value)
    assert any(said in str(error) for error in rules.check(cfg))


# -- what is computed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "numbers", "changes"),
    [
        ("qwen3", {}, {"rope_scaling": YARN}),
        ("qwen3", {"attention_bias": True}, {}),
        ("qwen3_moe", {}, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                            "original_max_position_embeddings": 16}}),
        ("deepseek", {}, {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
        ("deepseek", {"attention_bias": True}, {}),
        ("deepseek", GROUPS, {}),
    ],
)  # fmt: skip
def test_trainer_and_engine_compute_what_transformers_does(
    tmp_path: Path, family: str, numbers: dict[str, Any], changes: dict[str, Any]
) -> None:
    config = folder_of(tmp_path / "source", model(family, **numbers), **changes)
    weights = load_file(tmp_path / "source" / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("bias"):
            weights[name] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).mul(0.2).to(tensor.dtype)
    save_file(weights, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    tokens = torch.randint(16, 272, (40,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)(tokens[None]).logits[0]
        ours = build_model(config, dtype=torch.float32, seed=0)(tokens[None]).logits[0]
        module = build_model(config, dtype=torch.float32, seed=0, attention=ATTENTION, experts="eager")
        decoded, engine = engine_logits(config, module, tokens)
    assert (ours - theirs).abs().max() < 1e-4 and (decoded - theirs).abs().max() < 1e-4
    if numbers is GROUPS:
        routes = engine.routes()
        assert routes is not None
        groups = (routes // 2).sort(dim=-1).values
        assert ((groups[..., 1:] != groups[..., :-1]).sum(dim=-1) + 1 <= 2).all()  # experts of two groups at most
        names = [f"model.layers.{layer}.mlp.gate" for layer in engine.moe_layers]
        replayed = build_model(config, dtype=torch.float32, seed=0)
        replay = RouterReplay(replayed, names, RouterScore.sigmoid)
        recorded = torch.ones(40, dtype=torch.bool)
        with torch.no_grad(), replay.replaying(routes.transpose(0, 1).contiguous(), recorded):
            again = replayed(tokens[None]).logits[0]
        assert (again - theirs).abs().max() < 1e-4 and replay.take_statistics() == {"router_replay/disagreement": 0.0}


def test_a_multi_token_prediction_layer_that_is_not_used_is_left_out_by_name(tmp_path: Path) -> None:
    """As DeepSeek-V3 has one behind its last layer: in convert, both ways, in audit and at the start of a run."""
    config = folder_of(tmp_path / "source", model("deepseek"), num_nextn_predict_layers=1)
    path = tmp_path / "source" / "model.safetensors"
    weights = load_file(path)
    behind = {
        f"model.layers.2.{name}": torch.ones(64, 64, dtype=torch.bfloat16) for name in ("eh_proj.weight", "mlp.gate.weight")
    }
    save_file(weights | behind, path, {"format": "pt"})
    report = convert(tmp_path / "source", tmp_path / "int4", INT4, lambda _: {Role.routed_expert}, workers=1)
    assert any("2 tensors of multi-token-prediction layers" in note for note in report.notes)
    written = read_all(tmp_path / "int4")
    assert not [name for name in written if name.startswith("model.layers.2.")]
    assert json.loads((tmp_path / "int4" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    # a quantized source with a quantized layer there
    packed = {f"model.layers.2.{name}.weight_packed": torch.ones(64, 8, dtype=torch.int32) for name in ("eh_proj", "mlp.up_proj")}
    save_file(
        load_file(tmp_path / "int4" / "model.safetensors") | packed, tmp_path / "int4" / "model.safetensors", {"format": "pt"}
    )
    convert(tmp_path / "int4", tmp_path / "back", TensorFormat.bf16(), lambda _: (), workers=1)
    assert read_all(tmp_path / "back").keys() == weights.keys()
    plan = PrecisionPlan.with_format(config, TensorFormat.bf16(), ())
    assert audit_checkpoint(plan, tmp_path / "source", unused=FAMILIES["deepseek"].unused(config, list(load_file(path)))) == []
    assert len(audit_checkpoint(plan, tmp_path / "source")) == 1
    built = build_model(config, dtype=torch.float32, seed=0)
    assert len(built.model.layers) == 2 and checkpoint_config(config).num_nextn_predict_layers == 0
    save_config(config, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["num_nextn_predict_layers"] == 0


# -- a published visual tower ---------------------------------------------------------------------------------------------


def published_vl(path: Path) -> ModelConfig:
    """The shape of Qwen3-VL-4B with small numbers: patches of 16, a width, depth and heads of the tower's own, three deepstack
    layers in its middle."""
    toy = compose.load(
        ["model=tiny_vlm", "model.num_layers=4", "model.hidden_size=64", "model.head_dim=32"], check_rules=False
    ).config.model
    toy = ModelConfig(**vars(toy))
    values = family_of(toy).hf_config(toy)
    values["vision_config"] |= {
        "hidden_size": 48, "intermediate_size": 80, "num_heads": 4, "depth": 6, "patch_size": 16, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1, 3, 4], "out_hidden_size": 64, "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip
    text = values["text_config"]
    text["rope_scaling"] = {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"}
    del text["rope_parameters"]
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    built = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(**{k: v for k, v in values.items() if k not in ("model_type", "architectures")})
    )
    built.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(values))
    byte_tokenizer().save_pretrained(path)
    (path / "preprocessor_config.json").write_text('{"patch_size": 16, "merge_size": 2, "size": {"longest_edge": 16777216}}')
    return ModelConfig(**(vars(toy) | {"hf_checkpoint": str(path)}))


def test_a_published_tower_computes_what_transformers_does(tmp_path: Path) -> None:
    config = published_vl(tmp_path / "vl")
    shape = qwen3_vl.tower(config)
    assert (shape.hidden_size, shape.depth, shape.patch_size, shape.deepstack_layers) == (48, 6, 16, (1, 3, 4))
    assert list(agreement.problems(config, family_of(config), agreement.local_config(config) or {})) == []
    processor = image_processor(config, byte_tokenizer())
    assert processor.side == 32
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    tokens, (image,) = processor.place([30, 31, processor.token_id, 32, 33, 34, 35], [pixels])
    row = torch.tensor(tokens)
    kinds = torch.zeros_like(row)
    kinds[image.start : image.start + image.tokens] = 1
    reference = AutoModelForImageTextToText.from_pretrained(tmp_path / "vl", dtype=torch.float32)
    module = build_model(config, dtype=torch.float32, seed=0, attention=ATTENTION)
    module.set_attn_implementation({"vision_config": "sdpa"})
    built = build_model(config, dtype=torch.float32, seed=0)
    with torch.no_grad():
        theirs = reference(
            input_ids=row[None],
            pixel_values=image.patches(),
            image_grid_thw=torch.tensor([image.grid_thw]),
            mm_token_type_ids=kinds[None],
        ).logits[0]
        ours = built.lm_head(hidden_states(built, row[None], [(image,)]))[0]
        engine = EngineModel(
            config, PrecisionPlan.with_format(config, TensorFormat.bf16(), ()), torch.float32, torch.device("cpu"), module
        )
        features = engine.encode([(image,)])
        assert features is not None and len(features.deepstack) == 3
        placed = features.placed([(image,)], [0], [len(tokens)], [0])
        cache = KVCache(1, 64, torch.float32, torch.device("cpu"))
        hidden = engine.forward(
            cache, row.numpy(), np.array([0]), np.array([len(tokens)]), images=np.array([[image.extent]]), placed=placed
        )
        decoded = engine.logits(hidden)
    assert (ours - theirs).abs().max() < 1e-4 and (decoded - theirs).abs().max() < 1e-4
    save_config(config, tmp_path / "saved")
    assert (tmp_path / "saved" / "preprocessor_config.json").read_bytes() == (
        tmp_path / "vl" / "preprocessor_config.json"
    ).read_bytes()
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["vision_config"]["depth"] == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"out_hidden_size": 32}, "out_hidden_size"),
        ({"deepstack_visual_indexes": [1, 9]}, "not of 6 layers"),
        ({"depth": 0}, "(vision_config): `depth` is 0"),
        ({"hidden_act": "silu"}, "hidden_act"),
    ],
)
def test_a_tower_that_is_not_understood_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    config = published_vl(tmp_path / "vl")
    path = tmp_path / "vl" / "config.json"
    values = json.loads(path.read_text())
    values["vision_config"] |= changes
    path.write_text(json.dumps(values))
    found = list(agreement.problems(config, family_of(config), values))
    assert len(found) == 1 and said in str(found[0])


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.mtp], ids=lambda family: family.name)
def test_the_table_of_mtp_weights_is_what_their_layers_are_made_of(family: Family) -> None:
    """Online training looks up the one by the other's names."""
    model = replace(compose.load_config(["model=tiny_mtp"]).model, family=family.name, num_mtp_layers=2)
    layers, _ = mtp.build_layers(model, "eager", torch.float32)
    prefix = mtp.layers_of(family).prefix
    built = {f"{prefix}{i}.{name}": tuple(p.shape) for i, layer in enumerate(layers) for name, p in layer.named_parameters()}
    assert built == {p.name: p.shape for p in family.parameters(model) if p.role is Role.mtp}
