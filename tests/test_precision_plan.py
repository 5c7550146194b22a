"""The plan by role, and quantization_config written and read."""

# ruff: noqa: C408 (keyword tables read better)
from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig
from precision_plans import DENSE, FORMATS, MOONLIGHT, SPARSE, default_plan, every_model, precision, roles_of
from tiny_models import BASE, MOE

from runner.config import compose
from runner.config.schema import ModelConfig, Role
from runner.errors import UserError, UserErrors
from runner.models import family_of
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat
from tests.configs import MODELS as SHIPPED

# -- the plan ---------------------------------------------------------------------------------------------------------


@every_model
def test_default_roles(model: ModelConfig) -> None:
    plan = default_plan(model)
    assert roles_of(plan) == {Role.routed_expert if model.num_experts else Role.dense_mlp}
    table = {parameter.name: parameter for parameter in family_of(model).parameters(model)}
    assert list(plan.tensors) == list(table)
    wanted = {name for name, p in table.items() if p.role in roles_of(plan) and len(p.shape) == 2}
    assert set(plan.quantized) == wanted and wanted


@every_model
def test_what_engines_fuse_shares_a_global_scale_where_the_format_has_one(model: ModelConfig) -> None:
    roles = {Role.attention, Role.routed_expert if model.num_experts else Role.dense_mlp}
    plan = PrecisionPlan.with_format(model, TensorFormat.nvfp4(), roles)
    together = {plan.fused_with(name) for name in plan.quantized}
    prefix = "model.layers.1.mlp.experts.2" if model.num_experts else "model.layers.1.mlp"
    assert (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight") in together
    assert (f"{prefix}.down_proj.weight",) in together
    attention = [names for names in together if "layers.1.self_attn" in names[0] and len(names) > 1]
    qkv = tuple(f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
    assert attention == ([] if model is MOONLIGHT else [qkv])  # latent attention without a low rank for queries fuses nothing
    int4 = default_plan(model)
    assert all(int4.fused_with(name) == (name,) for name in int4.tensors)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_model_has_a_plan_that_reads_back(name: str) -> None:
    model = compose.load([f"model={name}"]).config.model
    plan, role = default_plan(model), Role.routed_expert if model.num_experts else Role.dense_mlp
    wanted = {p.name for p in family_of(model).parameters(model) if p.role is role and len(p.shape) == 2}
    assert plan.quantized.keys() == wanted
    again = PrecisionPlan.from_quantization_config(model, json.loads(json.dumps(plan.quantization_config())))
    assert again.tensors == plan.tensors


def test_queries_of_a_low_rank_are_fused_with_the_compressed_keys() -> None:
    """Kimi-K2's attention, as SGLang lays it out; Moonlight's queries have no low rank."""
    kimi = replace(MOONLIGHT, q_lora_rank=32)
    plan = PrecisionPlan.with_format(kimi, TensorFormat.nvfp4(), {Role.attention})
    first = "model.layers.0.self_attn"
    fused = (f"{first}.q_a_proj.weight", f"{first}.kv_a_proj_with_mqa.weight")
    assert plan.fused_with(fused[0]) == plan.fused_with(fused[1]) == fused
    assert {plan.fused_with(name) for name in plan.quantized if "layers.0" in name} == {
        fused,
        *((f"{first}.{name}.weight",) for name in ("q_b_proj", "kv_b_proj", "o_proj")),
    }


def test_roles_by_config() -> None:
    plan = PrecisionPlan.build(MOONLIGHT, precision([Role.attention, Role.shared_expert], group_size=16), "train")
    assert roles_of(plan) == {Role.attention, Role.shared_expert}


@pytest.mark.parametrize("role", [Role.router, Role.norm, Role.embedding, Role.lm_head])
def test_some_roles_are_never_quantized(role: Role) -> None:
    with pytest.raises(UserError, match=f"{role.name}.*never quantized"):
        PrecisionPlan.build(SPARSE, precision([Role.routed_expert, role]), "train")


def test_quantizing_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="would quantize nothing"):
        PrecisionPlan.build(DENSE, precision([Role.routed_expert]), "train")
    assert not PrecisionPlan.build(DENSE, precision(fmt="bf16"), "train").quantized


def test_every_shape_that_does_not_divide_is_named() -> None:
    model = ModelConfig(**(BASE | MOE | dict(expert_ffn_size=48)), name="odd", family="qwen3_moe")
    with pytest.raises(UserErrors, match=r"down_proj\.weight: in dimension 48 is not a multiple of group_size 32"):
        PrecisionPlan.build(model, precision(), "train")


def test_the_plan_does_not_import_torch() -> None:
    code = "import sys, runner.precision.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- quantization_config ----------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("tensor_format", FORMATS, ids=str)
def test_quantization_config_reads_back_as_the_same_plan(model: ModelConfig, tensor_format: TensorFormat) -> None:
    roles = {Role.routed_expert} if model.num_experts else {Role.dense_mlp}
    try:
        plan = PrecisionPlan.with_format(model, tensor_format, roles)
    except UserErrors:
        pytest.skip("this toy shape has no such format")
    config = json.loads(json.dumps(plan.quantization_config()))
    again = PrecisionPlan.from_quantization_config(model, config)
    assert again.tensors == plan.tensors
    assert plan.differences(again) == []


@pytest.mark.parametrize("tensor_format", [f for f in FORMATS if f.strategy != "block"], ids=str)
def test_compressed_tensors_accepts_the_config(tensor_format: TensorFormat) -> None:
    plan = PrecisionPlan.with_format(SPARSE, tensor_format, {Role.routed_expert})
    config = plan.quantization_config()
    assert config is not None
    parsed = QuantizationConfig.model_validate(config)
    args = parsed.config_groups["group_0"].weights
    assert args.num_bits == tensor_format.bits and args.symmetric
    assert set(parsed.ignore) == set(plan.ignored_modules())


def test_a_kept_module_is_ignored_under_the_name_that_engines_fuse_it_into() -> None:
    """SGLang looks for `gate_up_proj` in DeepSeek's models, and for the parts in others; a list of both suits all."""
    ignored = set(default_plan(MOONLIGHT).ignored_modules())
    assert {"model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"} <= ignored
    assert not any(".experts." in module for module in ignored), "routed experts are quantized"
    attention_only = PrecisionPlan.with_format(SPARSE, FORMATS[0], {Role.attention})
    assert not any(module.endswith("qkv_proj") for module in attention_only.ignored_modules())


def test_the_published_kimi_config() -> None:
    """quantization_config of Kimi-K2-Thinking: only routed experts are INT4, by regular expressions."""
    config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": [
            "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*", "re:.*mlp.gate$",
        ],
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": {
            "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False,
            "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {}}}},
    }  # fmt: skip
    plan = PrecisionPlan.from_quantization_config(MOONLIGHT, config)
    assert roles_of(plan) == {Role.routed_expert}
    assert default_plan(MOONLIGHT).differences(plan) == []
    assert {tensor.convention for tensor in plan.quantized.values()} == {None}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "hqq", "bits": 4}, "quant_method is 'hqq'"),
        ({"quant_method": "awq", "bits": 8, "group_size": 128}, "bits is 8; readable is 4"),
        ({"quant_method": "awq", "version": "gemv", "group_size": 128}, "version is 'gemv'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size is 0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"bits": 4}, "quant_method is None"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\]"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'"),
    ],
)
def test_what_is_not_understood_never_passes_as_bf16(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PrecisionPlan.from_quantization_config(DENSE, config)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "weights are stored rotated"),
        ({"transform_config": [1]}, "cannot be understood"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "stored as sparse-24-bitmask"),
        ({"sparsity_config": {"format": "marlin_24"}}, "stored as marlin_24"),
        ({"transform_config": {}, "sparsity_config": {}, "kv_cache_scheme": None}, None),
        ({"transform_config": {"config_groups": {}}, "sparsity_config": {"format": "dense"}}, None),
    ],
)
def test_weights_that_are_stored_rotated_or_sparse_are_refused(entry: dict[str, Any], message: str | None) -> None:
    """Their integers and scales read well, and give other weights."""
    if message is None:
        assert PrecisionPlan.from_quantization_config(DENSE, foreign() | entry).quantized
        return
    with pytest.raises(UserError, match=message):
        PrecisionPlan.from_quantization_config(DENSE, foreign() | entry)


def foreign(**weights: Any) -> dict[str, Any]:
    """A compressed-tensors config as llm-compressor writes it, for every Linear but lm_head."""
    base = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    group = {"targets": ["Linear"], "weights": base | weights, "input_activations": None}
    container = weights.pop("container", "pack-quantized")
    return {"quant_method": "compressed-tensors", "format": container, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 3}, "int3 weights"),
        ({"type": "float", "group_size": 64}, "float4 weights, strategy group, group_size 64"),
        ({"type": "float", "strategy": "tensor_group", "group_size": 32}, "strategy tensor_group, group_size 32"),
        ({"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [64, 64]}, r"block_structure is \[64, 64\]"),
        ({"actorder": "group"}, "activation order 'group'"),
        ({"num_bits": 8, "container": "int-quantized"}, "container int-quantized"),
    ],
)
def test_grids_of_another_program_that_cannot_be_read_are_named(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PrecisionPlan.from_quantization_config(DENSE, foreign(**weights))


def test_how_a_foreign_int4_checkpoint_differs_from_the_run_is_named() -> None:
    """Every Linear, attention too, asymmetric in groups of 64, where the run has the mlp symmetric in groups of 32."""
    config = foreign(symmetric=False, group_size=64)
    theirs = PrecisionPlan.from_quantization_config(DENSE, config)
    assert {t.symmetric for t in theirs.quantized.values()} == {False}
    found = default_plan(DENSE).differences(theirs)
    named = ("attention: run bf16, checkpoint int4", "group_size run 32, checkpoint 64", "run symmetric, checkpoint asymmetric")
    for words in named:
        assert sum(words in line for line in found) == 1, found
    assert len(found) == 3


def test_an_ignored_gate_does_not_swallow_gate_proj() -> None:
    """modules_to_not_convert holds whole dotted components, not substrings."""
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "mlp.gate"]}
    plan = PrecisionPlan.from_quantization_config(SPARSE, config)
    assert Role.router not in roles_of(plan)
    assert any(name.endswith("experts.0.gate_proj.weight") for name in plan.quantized)
