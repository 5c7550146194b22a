"""The audit against every planted defect: two sides, a folder, a stream, an engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from precision_plans import DENSE, INT4, SPARSE, default_plan, precision
from safetensors.torch import save_file

from runner.config.schema import Convention, Role
from runner.convert.compare import audit_checkpoint, compare_checkpoints, compare_streams, read_checkpoint
from runner.data import ExportedTensor
from runner.precision.audit import audit
from runner.precision.codec import encode_all
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat
from runner.rollout.audit import audit_engine
from runner.rollout.protocol import EngineDescription


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
