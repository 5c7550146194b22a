"""The plan by role, quantization_config written and read, and the audit against every planted defect."""

# ruff: noqa: C408 (keyword tables read better)
from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file
from tiny_models import BASE, MLA, MOE

from runner.config import compose
from runner.config.schema import Convention, GridConfig, ModelConfig, PrecisionConfig, Role
from runner.convert.compare import audit_checkpoint, compare_checkpoints, compare_streams, read_checkpoint
from runner.data import ExportedTensor
from runner.errors import UserError, UserErrors
from runner.models import family_of
from runner.precision.audit import audit
from runner.precision.codec import encode_all
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat
from runner.rollout.audit import audit_engine
from runner.rollout.protocol import EngineDescription
from tests.configs import MODELS as SHIPPED

DENSE = ModelConfig(**BASE, name="dense", family="qwen3")
TIED = ModelConfig(**(BASE | dict(tied_embeddings=True)), name="tied", family="qwen3")
SPARSE = ModelConfig(**(BASE | MOE), name="moe", family="qwen3_moe")
MOONLIGHT = ModelConfig(**(BASE | MOE | MLA), name="moonlight", family="deepseek")
MODELS = [DENSE, TIED, SPARSE, MOONLIGHT]
every_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
FORMATS = [
    TensorFormat.int4(32, Convention.exact),
    TensorFormat.int4(-1, Convention.llmcompressor),
    TensorFormat.int8(64, Convention.kimi),
    TensorFormat.fp8(),
    TensorFormat.fp8("channel"),
    TensorFormat.mxfp4(),
    TensorFormat.nvfp4(),
]
INT4 = FORMATS[0]


def precision(roles: list[Role] | None = None, fmt: str = "int4", group_size: int = 32) -> PrecisionConfig:
    def grid(kind: str) -> GridConfig:
        return GridConfig(format=kind, group_size=group_size, convention=Convention.exact)

    return PrecisionConfig(name="test", roles=roles, train=grid(fmt), rollout=grid(fmt))


def roles_of(plan: PrecisionPlan) -> set[Role]:
    return {plan.parameters[name].role for name in plan.quantized}


def default_plan(model: ModelConfig) -> PrecisionPlan:
    return PrecisionPlan.build(model, precision(), "rollout")


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
        ({"quant_method": "awq", "bits": 4}, "quant_method is 'awq'"),
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


# -- planted defects --------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, plan: PrecisionPlan, seed: int = 0) -> Path:
    """A checkpoint of random weights in a plan's formats."""
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for exported in stream(plan, seed):
        tensors |= exported.parts
    save_file(tensors, folder / "model.safetensors")
    write_config(folder, plan.quantization_config())
    return folder


def write_config(folder: Path, quantization_config: dict[str, Any] | None) -> None:
    config = {"quantization_config": quantization_config} if quantization_config else {}
    (folder / "config.json").write_text(json.dumps(config))


def stream(plan: PrecisionPlan, seed: int = 0) -> Iterator[ExportedTensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = ((n, torch.randn(*p.shape, generator=generator).bfloat16()) for n, p in plan.parameters.items())
    return encode_all(weights, plan)


def change(plan: PrecisionPlan, pattern: str, **fields: Any) -> PrecisionPlan:
    """The plan with other fields in every quantized tensor whose name matches."""
    changed = {n: replace(t, **fields) if t.quantized and re.search(pattern, n) else t for n, t in plan.tensors.items()}
    assert changed != dict(plan.tensors)
    return PrecisionPlan(changed, plan.parameters)


def drop(plan: PrecisionPlan, pattern: str) -> PrecisionPlan:
    changed = {n: TensorFormat.bf16() if t.quantized and re.search(pattern, n) else t for n, t in plan.tensors.items()}
    assert changed != dict(plan.tensors)
    return PrecisionPlan(changed, plan.parameters)


def test_equal_sides_have_no_differences(tmp_path: Path) -> None:
    plan = default_plan(SPARSE)
    folder = checkpoint(tmp_path / "a", plan)
    assert audit(("trainer", plan), ("engine", default_plan(SPARSE))) == []
    assert audit_checkpoint(plan, folder) == []
    assert compare_checkpoints(folder, checkpoint(tmp_path / "b", plan)) == []
    formats = EngineDescription(plan.formats, 32, "exact", "fp32")
    assert audit_engine(plan, formats) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale_dtype": "float32"}, "scale dtype trainer bfloat16, engine float32"),
        ({"group_size": 64}, "group_size trainer 32, engine 64"),
        ({"symmetric": False}, "trainer symmetric, engine asymmetric"),
        ({"convention": Convention.kimi}, "convention trainer exact, engine kimi"),
    ],
)
def test_grids_that_differ_are_named(fields: dict[str, Any], message: str) -> None:
    plan = default_plan(SPARSE)
    problems = audit(("trainer", plan), ("engine", change(plan, r"experts\.2\.", **fields)))
    assert len(problems) == 1 and message in problems[0] and "experts.2.gate_proj" in problems[0]


def test_a_dense_mlp_that_was_silently_left_out() -> None:
    plan = default_plan(DENSE)
    problems = audit(("trainer", PrecisionPlan.build(DENSE, precision(fmt="bf16"), "train")), ("engine", plan))
    assert len(problems) == 1 and "dense_mlp: trainer bf16, engine int4" in problems[0]


def test_gate_up_proj_swallowed_by_a_pattern() -> None:
    plan = default_plan(DENSE)
    problems = audit(("checkpoint", plan), ("engine", drop(plan, r"mlp\.(gate|up)_proj")))
    assert len(problems) == 1 and "checkpoint int4, engine bf16" in problems[0] and "gate_proj" in problems[0]


def test_a_quantized_router_is_caught_on_any_side(tmp_path: Path) -> None:
    plan = default_plan(SPARSE)
    config = plan.quantization_config()
    assert config is not None
    config["ignore"] = [module for module in config["ignore"] if not module.endswith("mlp.gate")]
    folder = checkpoint(tmp_path / "a", plan)
    write_config(folder, config)
    problems = audit_checkpoint(plan, folder)
    assert any("quantizes the router" in problem and "layers.0.mlp.gate.weight" in problem for problem in problems)

    router = {name: INT4 if name.endswith("mlp.gate.weight") else tensor for name, tensor in plan.tensors.items()}
    stored = checkpoint(tmp_path / "b", PrecisionPlan(router, plan.parameters))
    write_config(stored, plan.quantization_config())
    assert any("router: run bf16, stored int4" in problem for problem in audit_checkpoint(plan, stored))


def test_modules_to_not_convert_that_were_converted(tmp_path: Path) -> None:
    plan = PrecisionPlan.with_format(SPARSE, TensorFormat.fp8(), {Role.routed_expert})
    everything = PrecisionPlan.with_format(SPARSE, TensorFormat.fp8(), {Role.routed_expert, Role.attention})
    folder = checkpoint(tmp_path / "a", everything)
    write_config(folder, plan.quantization_config())
    problems = audit_checkpoint(plan, folder)
    assert len(problems) == 1 and "attention: run bf16, stored fp8" in problems[0]


def test_a_method_nobody_knows(tmp_path: Path) -> None:
    plan = default_plan(SPARSE)
    folder = checkpoint(tmp_path / "a", PrecisionPlan.build(SPARSE, precision(fmt="bf16"), "train"))
    write_config(folder, {"quant_method": "mystery"})
    problems = audit_checkpoint(plan, folder)
    assert any("quant_method is 'mystery'" in problem for problem in problems)
    assert any("routed_expert: run int4, stored bf16" in problem for problem in problems)
    engine = EngineDescription(plan.formats | {next(iter(plan.quantized)): "mystery"}, 32, "exact", "fp32")
    assert "'mystery' is no precision format" in audit_engine(plan, engine)[0]


def test_an_engine_that_runs_bf16_unnoticed() -> None:
    plan = default_plan(SPARSE)
    engine = EngineDescription(dict.fromkeys(plan.tensors, "bf16"), 32, "exact", "bf16")
    assert "run int4, engine bf16" in audit_engine(plan, engine)[0]
    other_group = EngineDescription(plan.formats, 128, "exact", "bf16")
    assert "group_size run 32, engine 128" in audit_engine(plan, other_group)[0]


@pytest.mark.parametrize("defect", ["scale_dtype", "group_size", "zero_point", "missing", "extra", "nan_scale"])
def test_stored_tensors_that_differ_from_the_plan(defect: str, tmp_path: Path) -> None:
    plan = default_plan(SPARSE)
    folder = checkpoint(tmp_path / "a", plan)
    tensors: dict[str, torch.Tensor] = {}
    for exported in read_checkpoint(folder):
        tensors |= exported.parts
    module = "model.layers.1.mlp.experts.3.up_proj"
    scale = tensors[f"{module}.weight_scale"]
    expected = {
        "scale_dtype": "scale dtype run bfloat16, stored float32",
        "group_size": "scale shape run (64, 2), stored (64, 1)",
        "zero_point": "run symmetric, stored asymmetric",
        "missing": "missing",
        "extra": "not a parameter of this model",
        "nan_scale": "scales that are not positive and finite",
    }[defect]
    match defect:
        case "scale_dtype":
            tensors[f"{module}.weight_scale"] = scale.float()
        case "group_size":
            tensors[f"{module}.weight_scale"] = scale[:, :1].contiguous()
        case "zero_point":
            tensors[f"{module}.weight_zero_point"] = torch.zeros(8, 2, dtype=torch.int32)
        case "missing":
            for part in ("weight_packed", "weight_scale", "weight_shape"):
                del tensors[f"{module}.{part}"]
        case "extra":
            module = "model.layers.9.mlp.experts.3.up_proj"
            tensors[f"{module}.weight"] = torch.zeros(4, 4, dtype=torch.bfloat16)
        case "nan_scale":
            scale[3, 1] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    problems = audit_checkpoint(plan, folder)
    assert len(problems) == 1 and expected in problems[0] and f"{module}.weight" in problems[0]


def test_fused_weights_with_global_scales_of_their_own(tmp_path: Path) -> None:
    """NVFP4 as a converter writes it that goes weight by weight: engines refuse it, or compute up_proj with gate_proj's scale."""
    plan = PrecisionPlan.with_format(SPARSE, TensorFormat.nvfp4(), {Role.routed_expert})
    folder = checkpoint(tmp_path / "a", plan)
    assert audit_checkpoint(plan, folder) == []
    tensors: dict[str, torch.Tensor] = {}
    for exported in read_checkpoint(folder):
        tensors |= exported.parts
    tensors["model.layers.1.mlp.experts.2.up_proj.weight_global_scale"] *= 2
    save_file(tensors, folder / "model.safetensors")
    problems = audit_checkpoint(plan, folder)
    assert len(problems) == 1 and "share no global scale: model.layers.1.mlp.experts.2.gate_up_proj" in problems[0]


def test_a_checkpoint_on_the_grid_that_another_program_documents(tmp_path: Path) -> None:
    """The trainer says symmetric groups of 64; the converter's documentation gives asymmetric groups of 32."""
    plan = PrecisionPlan.build(SPARSE, precision(group_size=64), "train")
    folder = checkpoint(tmp_path / "a", default_plan(SPARSE))
    config = default_plan(SPARSE).quantization_config()
    assert config is not None
    weights = config["config_groups"]["group_0"]["weights"]
    weights |= {"symmetric": False, "observer_kwargs": {}}
    write_config(folder, config)
    problems = audit_checkpoint(plan, folder)
    claimed, stored = problems[:2], problems[2:]
    assert "group_size run 64, checkpoint config.json 32" in claimed[0]
    assert "run symmetric, checkpoint config.json asymmetric" in claimed[1]
    assert stored and all("scale shape run" in problem for problem in stored)


def test_streams_are_compared_bit_by_bit() -> None:
    plan = default_plan(SPARSE)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"

    def tampered(kind: str) -> Iterator[ExportedTensor]:
        for exported in stream(plan):
            parts = dict(exported.parts)
            if exported.name == name:
                packed, scale = parts[f"{name}_packed"], parts[f"{name}_scale"]
                if kind == "flipped bit":
                    parts[f"{name}_packed"] = packed.clone()
                    parts[f"{name}_packed"][0, 0] ^= 16
                elif kind == "layout":
                    parts[f"{name}_packed"] = packed.t().contiguous().view(packed.shape)
                elif kind == "scale":
                    parts[f"{name}_scale"] = scale * 2
                elif kind == "dropped":
                    continue
                elif kind == "twice":  # in two buckets
                    yield exported
                elif kind == "another rank's":  # metadata of rank 0 for a tensor of rank 1: right names and shapes
                    other = dict(next(e for e in stream(plan) if e.name == name.replace("experts.3", "experts.0")).parts)
                    parts[f"{name}_scale"] = other[f"{name}_scale".replace("experts.3", "experts.0")]
                elif kind == "cut":  # a bucket too small for its last tensor
                    parts[f"{name}_packed"] = packed[:-1]
            yield ExportedTensor(exported.name, exported.format, parts)

    def compare(kind: str) -> list[str]:
        return compare_streams(stream(plan), tampered(kind), ("trainer", "engine"))

    assert compare("nothing") == []
    assert compare("flipped bit") == [f"{name}_packed: 1 of 4096 values differ"]
    assert "another layout at equal shape" in compare("layout")[0]
    assert compare("scale")[0].startswith(f"{name}_scale: 128 of 128 values differ")
    assert compare("dropped") == [f"{name}: only in trainer"]
    assert compare("twice") == [f"{name}: sent twice by engine"]
    assert compare("another rank's")[0].startswith(f"{name}_scale: ") and "values differ" in compare("another rank's")[0]
    assert compare("cut") == [f"{name}_packed: shape trainer (64, 8), engine (63, 8)"]
    assert compare_streams(stream(plan), reversed(list(stream(plan)))) == []


def test_a_scale_dtype_difference_between_folders(tmp_path: Path) -> None:
    plan = default_plan(SPARSE)
    a, b = checkpoint(tmp_path / "a", plan), checkpoint(tmp_path / "b", plan)
    tensors: dict[str, torch.Tensor] = {}
    for exported in read_checkpoint(b):
        tensors |= exported.parts
    key = "model.layers.0.mlp.experts.0.down_proj.weight_scale"
    tensors[key] = tensors[key].float()
    save_file(tensors, b / "model.safetensors")
    assert compare_checkpoints(a, b) == [f"{key}: dtype a bfloat16, b float32"]
