"""Scales and parts of foreign folders in another shape or dtype: read right, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import foreign_sources
import pytest
import torch
from convert_sources import read_all, write_source
from foreign_sources import BF16, DOWN, INT4, Tensors, edit_tensors, refused_everywhere, run, start

from runner.config.schema import Convention, ModelConfig
from runner.errors import UserError
from runner.precision import fp4
from runner.precision.tensor_format import TensorFormat

dense, source = foreign_sources.dense, foreign_sources.source


def square(config: ModelConfig) -> ModelConfig:
    """Where a scale per row also broadcasts over columns."""
    return replace(config, ffn_size=config.hidden_size)


def expected_back(folder: Path, tmp_path: Path) -> Tensors:
    run(folder, tmp_path / "expected", BF16)
    return read_all(tmp_path / "expected")


def both_ways_equal(folder: Path, config: ModelConfig, tmp_path: Path, expected: Tensors) -> None:
    run(folder, tmp_path / "back", BF16)
    back, started = read_all(tmp_path / "back"), start(folder, config)
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(back[name], tensor), name
        assert name not in started or torch.equal(started[name], tensor), name


@pytest.mark.parametrize("tensor_format", [TensorFormat.fp8("channel"), TensorFormat.int4(-1, Convention.kimi)])
def test_channel_scales_as_one_row(tmp_path: Path, dense: ModelConfig, tensor_format: TensorFormat) -> None:
    config = square(dense)
    write_source(tmp_path / "source", config)
    run(tmp_path / "source", tmp_path / "q", tensor_format)
    expected = expected_back(tmp_path / "q", tmp_path)

    def flat(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = tensors[name].flatten()

    edit_tensors(tmp_path / "q", flat)
    both_ways_equal(tmp_path / "q", config, tmp_path, expected)


@pytest.mark.parametrize("tensor_format", [TensorFormat.fp8("block"), TensorFormat.fp8("channel"), TensorFormat.fp8("tensor")])
@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.bfloat16])
def test_scales_in_another_dtype(tmp_path: Path, dense: ModelConfig, tensor_format: TensorFormat, dtype: torch.dtype) -> None:
    """Powers of two, which all these dtypes hold: the same weights come back whatever the scales' dtype."""
    write_source(tmp_path / "source", dense)
    run(tmp_path / "source", tmp_path / "q", tensor_format)

    def rounded(tensors: Tensors) -> None:
        for name in tensors:
            if "weight_scale" in name:
                tensors[name] = torch.exp2(tensors[name].log2().round())

    edit_tensors(tmp_path / "q", rounded)
    expected = expected_back(tmp_path / "q", tmp_path)
    edit_tensors(
        tmp_path / "q",
        lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items() if "weight_scale" in name}),
    )
    both_ways_equal(tmp_path / "q", dense, tmp_path, expected)


def test_mxfp4_scales_by_their_own_dtype(source: Path, dense: ModelConfig, tmp_path: Path) -> None:
    run(source, tmp_path / "q", TensorFormat.mxfp4())
    expected = expected_back(tmp_path / "q", tmp_path)

    def e8m0(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name] = tensors[name].view(torch.float8_e8m0fnu)

    edit_tensors(tmp_path / "q", e8m0)
    both_ways_equal(tmp_path / "q", dense, tmp_path, expected)


def test_every_e8m0_value_is_torchs_own() -> None:
    every = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(fp4.e8m0_to_float(every), every.view(torch.float8_e8m0fnu).float())


@pytest.mark.parametrize(
    ("tensor_format", "part", "change"),
    [
        (INT4, "weight_scale", lambda t: t[:, ::2]),  # too few groups: twice as wide ones, without an error
        (INT4, "weight_scale", lambda t: t.repeat_interleave(2, 1)),
        (INT4, "weight_scale", lambda t: t[:, :1]),
        (INT4, "weight_scale", lambda t: t.to(torch.float8_e8m0fnu)),
        (INT4, "weight_packed", lambda t: t[:, :-1]),
        (INT4, "weight_packed", lambda t: t.to(torch.int64)),
        (TensorFormat.int8(64, Convention.kimi), "weight_scale", lambda t: t[:, :1]),
        (TensorFormat.fp8("block"), "weight_scale_inv", lambda t: t[:1, :1]),
        (TensorFormat.fp8("block"), "weight_scale_inv", lambda t: torch.cat([t, t])),
        (TensorFormat.fp8("block"), "weight_scale_inv", lambda t: t.to(torch.int32)),
        (TensorFormat.fp8("channel"), "weight_scale", lambda t: t.T),
        (TensorFormat.fp8("channel"), "weight_scale", lambda t: t[:1]),
        (TensorFormat.fp8("tensor"), "weight_scale", lambda t: t.repeat(2)),
        (TensorFormat.mxfp4(), "weight_scale", lambda t: t[:, ::2]),
        (TensorFormat.nvfp4(), "weight_scale", lambda t: t[:, ::2]),
        (TensorFormat.nvfp4(), "weight_global_scale", lambda t: t.repeat(2)),
        (TensorFormat.nvfp4(), "weight_global_scale", lambda t: t.bfloat16()),
    ],
)
def test_parts_of_another_shape_or_dtype(
    source: Path,
    dense: ModelConfig,
    tmp_path: Path,
    tensor_format: TensorFormat,
    part: str,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    run(source, tmp_path / "q", tensor_format)
    edit_tensors(tmp_path / "q", lambda tensors: tensors.update({f"{DOWN}.{part}": change(tensors[f"{DOWN}.{part}"])}))
    refused_everywhere(tmp_path / "q", dense, tmp_path, f"{DOWN}.weight has {part}")


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape", "weight_packed"])
def test_a_part_that_is_missing(source: Path, dense: ModelConfig, tmp_path: Path, part: str) -> None:
    run(source, tmp_path / "q")
    edit_tensors(tmp_path / "q", lambda tensors: tensors.pop(f"{DOWN}.{part}"))
    refused_everywhere(tmp_path / "q", dense, tmp_path, f"{DOWN}.weight has no {part} beside it")


def test_a_shape_that_the_parts_do_not_have(source: Path, dense: ModelConfig, tmp_path: Path) -> None:
    """Headers do not show what weight_shape says."""
    run(source, tmp_path / "q")
    edit_tensors(tmp_path / "q", lambda tensors: tensors.update({f"{DOWN}.weight_shape": torch.tensor([128, 252])}))
    for opened in (lambda: run(tmp_path / "q", tmp_path / "back", BF16), lambda: start(tmp_path / "q", dense)):
        with pytest.raises(UserError, match="down_proj"):
            opened()


@pytest.mark.parametrize("value", [255, 254])
def test_scales_that_give_no_number(source: Path, dense: ModelConfig, tmp_path: Path, value: int) -> None:
    run(source, tmp_path / "q", TensorFormat.fp8())
    scale = torch.full((1, 2), value, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    edit_tensors(tmp_path / "q", lambda tensors: tensors.update({f"{DOWN}.weight_scale_inv": scale}))
    for opened in (lambda: run(tmp_path / "q", tmp_path / "back", BF16), lambda: start(tmp_path / "q", dense)):
        with pytest.raises(UserError, match="down_proj.*(not finite|NaN|infinite)"):
            opened()


@pytest.mark.parametrize("tensor_format", [TensorFormat.fp8(), INT4, TensorFormat.nvfp4()])
@pytest.mark.parametrize("kind", ["negative", "zero"])
def test_scales_that_no_quantizer_writes(
    source: Path, dense: ModelConfig, tmp_path: Path, tensor_format: TensorFormat, kind: str
) -> None:
    """Every number is finite, so nothing but the scales themselves shows it."""
    run(source, tmp_path / "q", tensor_format)

    def damage(tensors: Tensors) -> None:
        for name, part in tensors.items():
            if name.startswith(f"{DOWN}.") and "scale" in name:
                tensors[name] = torch.zeros_like(part) if kind == "zero" else (-part.float()).to(part.dtype)

    edit_tensors(tmp_path / "q", damage)
    for opened in (lambda: run(tmp_path / "q", tmp_path / "back", BF16), lambda: start(tmp_path / "q", dense)):
        with pytest.raises(UserError, match="down_proj.*(negative scales|no scale but 0)"):
            opened()


def test_a_group_of_zeros_may_have_a_scale_of_zero(source: Path, dense: ModelConfig, tmp_path: Path) -> None:
    run(source, tmp_path / "q")

    def zero(tensors: Tensors) -> None:
        tensors[f"{DOWN}.weight_scale"][0, 0] = 0

    edit_tensors(tmp_path / "q", zero)
    both_ways_equal(tmp_path / "q", dense, tmp_path, expected_back(tmp_path / "q", tmp_path))
