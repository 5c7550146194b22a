"""A precision format is one file: that of docs/extending.md is converted, audited and brought back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from convert_sources import model, write_source

from runner.config import compose
from runner.config.schema import Convention, PrecisionConfig, Role
from runner.convert.compare import audit_checkpoint
from runner.convert.engine import convert
from runner.errors import UserErrors
from runner.precision import codec, formats
from runner.precision.plan import PrecisionPlan, quantized_roles
from runner.precision.tensor_format import TensorFormat
from tests.extending import module


@pytest.fixture(autouse=True)
def six() -> Iterator[None]:
    formats.register(module("runner/precision/formats/six.py").FORMAT)
    yield
    del formats._registered["six"]


def test_is_converted_audited_and_brought_back(tmp_path: Path) -> None:
    def chosen(config: object) -> frozenset[Role]:
        return quantized_roles(config, PrecisionConfig(roles=None))  # type: ignore[arg-type]

    config = model("qwen3")
    weights = write_source(tmp_path / "source", config)
    grid = TensorFormat.named("six")
    convert(tmp_path / "source", tmp_path / "six", grid, chosen, workers=2)
    plan = PrecisionPlan.with_format(config, grid, chosen(config))
    assert plan.quantized and audit_checkpoint(plan, tmp_path / "six") == []
    other = PrecisionPlan.with_format(config, TensorFormat.int4(32, Convention.exact), chosen(config))
    assert audit_checkpoint(other, tmp_path / "six")
    convert(tmp_path / "six", tmp_path / "back", TensorFormat.bf16(), chosen, workers=2)
    name = next(iter(plan.quantized))
    from safetensors.torch import load_file

    back = {k: v for file in (tmp_path / "back").glob("*.safetensors") for k, v in load_file(file).items()}
    assert torch.equal(back[name], codec.quantize_dequantize(weights[name], grid)[0])


def test_unknown_format_is_named_with_those_there_are() -> None:
    with pytest.raises(UserErrors) as caught:
        compose.load_config(["precision.train.format=int5"])
    (problem,) = caught.value.errors
    assert "'int5' is none of bf16, fp8, int4, int8, mxfp4, nvfp4, six" in problem.problem and problem.fix


def test_counting_bytes_imports_no_torch() -> None:
    code = (
        "import sys; from runner.precision.tensor_format import TensorFormat as T; from runner.precision.formats import names;"
        "print(names(), T.named('nvfp4').stored_bytes((16, 32)), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0].endswith("292 False"), done.stdout
