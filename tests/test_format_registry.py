"""A precision format is one file: one that only this test knows goes through every part of the program."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from convert_sources import model, write_source

from runner.config import compose, rules
from runner.config.schema import Convention, PrecisionConfig, Role
from runner.convert.engine import convert
from runner.convert.grid import target_format
from runner.errors import UserErrors
from runner.planner.parameters import take_inventory
from runner.planner.traffic import stream_bytes
from runner.precision import codec, formats
from runner.precision.audit import audit_checkpoint
from runner.precision.formats import FormatSpec, Part, Scales, Scheme
from runner.precision.plan import PrecisionPlan, quantized_roles
from runner.precision.tensor_format import TensorFormat

GROUP = 32


class Six(FormatSpec):
    """Integers of 6 bits in a byte each, an fp32 scale per 32 weights."""

    name = "six"
    bits = 8
    scale_dtype = "float32"
    part_names = ("weight_packed", "weight_scale")
    fixed_group = GROUP
    container = "six-quantized"

    def grid(self, group_size: int, convention: Convention | None, strategy: str) -> TensorFormat:
        return TensorFormat(self.name, GROUP, None, strategy)

    def parts(self, tensor_format: TensorFormat, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        return Part("weight_packed", "int8", (rows, columns)), Part("weight_scale", "float32", (rows, columns // GROUP))

    def holds(self, parts: Mapping[str, torch.Tensor]) -> bool:
        return "weight_packed" in parts and parts["weight_packed"].dtype is torch.int8

    def _quantize(self, weight: torch.Tensor, kept: Scales | None) -> tuple[torch.Tensor, torch.Tensor]:
        grouped = weight.float().unflatten(-1, (-1, GROUP))
        scale = kept.scale if kept else (grouped.abs().amax(-1) / 31).clamp(min=1e-6)
        return (grouped / scale.unsqueeze(-1)).round().to(torch.int8).flatten(-2), scale

    def encode(self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None) -> dict[str, torch.Tensor]:
        integers, scale = self._quantize(weight, kept)
        return {"weight_packed": integers, "weight_scale": scale}

    def values(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts["weight_packed"]

    def unpacked(self, body: torch.Tensor) -> torch.Tensor:
        return body

    def decode(self, parts: Mapping[str, torch.Tensor], scales: Scales, tensor_format: TensorFormat) -> torch.Tensor:
        grouped = parts["weight_packed"].float().unflatten(-1, (-1, GROUP))
        return (grouped * scales.scale.unsqueeze(-1)).flatten(-2).to(torch.bfloat16)

    def quantize_dequantize(
        self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None
    ) -> tuple[torch.Tensor, Scales]:
        integers, scale = self._quantize(weight, kept)
        return self.decode({"weight_packed": integers}, Scales(scale), tensor_format), Scales(scale)

    def read_scheme(self, scheme: Scheme) -> TensorFormat | None:
        return TensorFormat.named(self.name) if scheme.container == self.container else None


@pytest.fixture(autouse=True)
def six() -> Iterator[None]:
    formats.register(Six())
    yield
    del formats._registered["six"]


def test_encodes_and_decodes_as_it_trains() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    grid = TensorFormat.named("six")
    exported = codec.encode("a.up_proj.weight", weight, grid)
    assert {part: (str(t.dtype), tuple(t.shape)) for part, t in exported.parts.items()} == {
        f"a.up_proj.{part.name}": (f"torch.{part.dtype}", part.shape) for part in grid.parts((48, 64))
    }
    assert grid.stored_bytes((48, 64)) == sum(part.nbytes for part in exported.parts.values()) == 48 * 64 + 48 * 2 * 4
    trained = weight.clone()
    scales = codec.quantize_dequantize_(trained, grid)
    assert torch.equal(trained, codec.decode(exported, grid)) and not torch.equal(trained, weight)
    again = codec.encode("a.up_proj.weight", trained, grid, scales)
    assert torch.equal(codec.integers(again, grid), codec.integers(exported, grid))


def test_is_composed_checked_and_planned() -> None:
    cfg = compose.load_config(["precision=mxfp4_qat", "precision.train.format=six", "precision.rollout.format=six"])
    assert rules.check(cfg) == []
    plan = PrecisionPlan.build(cfg.model, cfg.precision, "rollout")
    grid = TensorFormat.named("six")
    expected = sum(
        grid.stored_bytes(p.shape) if name in plan.quantized else TensorFormat.bf16().stored_bytes(p.shape)
        for name, p in plan.parameters.items()
    )
    assert plan.quantized and stream_bytes(cfg, take_inventory(cfg)) == expected
    cfg = compose.load_config(["convert.format=six"])
    assert target_format(cfg) == grid


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
