"""Every family's twin (twins.py) to INT4 and FP8: transformers loads it through compressed-tensors and computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from convert_sources import write_source
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig

from runner.config import compose
from runner.config.schema import Convention, PrecisionConfig
from runner.convert.compare import audit_checkpoint
from runner.convert.engine import convert
from runner.models import family_of
from runner.models.build import disk_tensors, named_weights
from runner.precision import codec
from runner.precision.plan import PrecisionPlan, quantized_roles
from runner.precision.tensor_format import TensorFormat
from tests import twins

GRIDS = {"int4": TensorFormat.int4(32, Convention.exact), "fp8": TensorFormat.fp8("block")}
# gpt-oss's experts transformers reads in bf16 and MXFP4 alone: test_gpt_oss.py
ONE_OF_EACH = [name for name in twins.one_of_each_family() if name != "gpt_oss"]


@pytest.mark.parametrize("grid_name", GRIDS)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_conversion_loads_in_transformers_and_is_the_fake_quantized_model(name: str, grid_name: str, tmp_path: Path) -> None:
    """Tolerance zero, as in test_convert_proof.py; and back in bf16 it holds the effective weights."""
    folder, grid = tmp_path / "source", GRIDS[grid_name]
    model = twins.twin(folder, name)
    family, tokens = family_of(model), torch.arange(40).reshape(2, 20) * 7 % 272
    roles = quantized_roles(model, PrecisionConfig(roles=None))
    convert(folder, tmp_path / "target", grid, lambda _: roles, workers=1)
    plan = PrecisionPlan.with_format(model, grid, roles)
    assert audit_checkpoint(plan, tmp_path / "target") == []
    how = {} if grid_name == "fp8" else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    with torch.no_grad():
        original = twins.loaded_by_transformers(folder, dtype=torch.bfloat16)
        plain = original(tokens).logits
        views = dict(disk_tensors(family, model, named_weights(model, original)))
        quantized = [(key, view) for key, view in views.items() if key in plan.quantized]
        for exported in codec.encode_all(quantized, plan):
            views[exported.name].copy_(codec.decode(exported, plan.tensors[exported.name]))
        expected = original(tokens).logits
        loaded = twins.loaded_by_transformers(tmp_path / "target", dtype=torch.bfloat16, **how)(tokens).logits
    assert quantized and not torch.equal(plain, expected)
    assert torch.equal(loaded, expected)
    convert(tmp_path / "target", tmp_path / "back", TensorFormat.bf16(), lambda _: (), workers=1)
    back = twins.weights_of(tmp_path / "back")
    assert all(torch.equal(back[key], view) for key, view in views.items())


@pytest.mark.parametrize("grid_name", GRIDS)
def test_a_vision_model_keeps_its_tower(grid_name: str, tmp_path: Path) -> None:
    """Qwen3-VL has no twin: the toy model, whose decoder is quantized and whose tower is not."""
    model, grid = compose.load_config(["model=tiny_vlm"]).model, GRIDS[grid_name]
    weights = write_source(tmp_path / "source", model, shards=1)
    roles = quantized_roles(model, PrecisionConfig(roles=None))
    convert(tmp_path / "source", tmp_path / "target", grid, lambda _: roles, workers=1)
    plan = PrecisionPlan.with_format(model, grid, roles)
    assert audit_checkpoint(plan, tmp_path / "target") == [] and plan.quantized
    effective = {
        exported.name: codec.decode(exported, plan.tensors[exported.name])
        for exported in codec.encode_all([(name, weights[name]) for name in plan.quantized], plan)
    }
    how = {} if grid_name == "fp8" else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "target", dtype=torch.bfloat16, **how)
    found = dict(disk_tensors(family_of(model), model, loaded.state_dict().items()))
    for name, weight in (weights | effective).items():
        assert torch.equal(found[name], weight), name
