"""Every family's twin (twins.py) to INT4 and FP8: transformers loads it through compressed-tensors and computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CompressedTensorsConfig

from runner.config.schema import Convention, PrecisionConfig
from runner.convert.engine import convert
from runner.models import family_of
from runner.models.build import disk_tensors
from runner.precision import codec
from runner.precision.audit import audit_checkpoint
from runner.precision.plan import PrecisionPlan, quantized_roles
from runner.precision.tensor_format import TensorFormat
from tests import twins

ONE_OF_EACH = twins.one_of_each_family()
GRIDS = {"int4": TensorFormat.int4(32, Convention.exact), "fp8": TensorFormat.fp8("block")}


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
        views = dict(disk_tensors(family, model, original.state_dict().items()))
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
