"""INT4 folders as AutoAWQ and GPTQ programs pack them: read to the weights that they stand for, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from safetensors.torch import load_file

from runner.config.schema import Convention, Role
from runner.convert.engine import convert
from runner.data import ExportedTensor
from runner.errors import UserError, UserErrors
from runner.models import family_of
from runner.models.build import build_model, disk_tensors, named_weights
from runner.precision import codec
from runner.precision.tensor_format import TensorFormat
from tests import twins

GROUP, ROLES = 32, (Role.dense_mlp,)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's: the outputs of a word's integers, from the lowest bits on
CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "gptq_by_activation": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2", "dynamic": {}},
    "gptq_rows": {"quant_method": "gptq", "bits": 4, "group_size": -1},
}


def words(integers: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """[a, b] of 0 .. 15 -> int32 [a, b / 8]: integer i of a word is that of column order[i]."""
    found = torch.zeros(integers.shape[0], integers.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate(order):
        found |= integers[:, column::8] << (4 * place)
    return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32)


def packed(rows: int, columns: int, kind: str, draw: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(parts of a drawn weight as `kind` stores them, the weight [rows, columns] in bf16)."""
    groups = 1 if CONFIGS[kind]["group_size"] == -1 else columns // GROUP
    integers = torch.randint(0, 16, (columns, rows), generator=draw)
    zeros = torch.randint(1, 16, (groups, rows), generator=draw)
    scales = (torch.rand(groups, rows, generator=draw) * 0.02 + 0.001).to(torch.float16)
    group = torch.arange(columns) // (columns // groups)
    if kind == "gptq_by_activation":
        group = group[torch.randperm(columns, generator=draw)]
    weight = torch.empty(rows, columns, dtype=torch.float64)
    for column in range(columns):
        weight[:, column] = (integers[column] - zeros[group[column]]).double() * scales[group[column]].double()
    if kind == "awq":
        return {"qweight": words(integers, ORDER), "qzeros": words(zeros, ORDER), "scales": scales}, weight.bfloat16()
    stored = zeros if kind == "gptq_v2" else zeros - 1
    parts = {"qweight": words(integers.t()).t().contiguous(), "qzeros": words(stored), "scales": scales}
    return parts | {"g_idx": group.to(torch.int32)}, weight.bfloat16()


def write(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """A twin of Qwen2.5 whose layers' matrices are packed; the weights that the folder stands for."""
    twins.twin(folder, "qwen2")
    weights, draw = twins.weights_of(folder), torch.Generator().manual_seed(4)
    stored = dict[str, torch.Tensor]()
    for name, weight in weights.items():
        if weight.dim() != 2 or ".layers." not in name:
            stored[name] = weight.half()  # what such programs leave alone, they write in fp16
            weights[name] = weight.half().bfloat16()
            continue
        parts, weights[name] = packed(*weight.shape, kind, draw)
        stored |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    twins.write_weights(folder, stored)
    edit(folder, CONFIGS[kind])
    return weights


def edit(folder: Path, quantization: dict[str, Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_is_read_as_the_weights_it_stands_for(kind: str, tmp_path: Path) -> None:
    """By the converter, to bf16, and by what trainers start from."""
    weights = write(tmp_path / "source", kind)
    convert(tmp_path / "source", tmp_path / "target", TensorFormat.bf16(), lambda _: (), workers=1)
    assert "quantization_config" not in json.loads((tmp_path / "target" / "config.json").read_text())
    model = twins.model_of(tmp_path / "source")
    built = build_model(model, dtype=torch.bfloat16, seed=0)
    masters = dict(disk_tensors(family_of(model), model, named_weights(model, built)))
    found = twins.weights_of(tmp_path / "target")
    assert found.keys() == masters.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name].bfloat16(), weight) and torch.equal(masters[name], weight), name


def test_awq_is_what_compressed_tensors_makes_of_it() -> None:
    parts, weight = packed(64, 128, "awq", torch.Generator().manual_seed(5))
    theirs = AutoAWQConverter(group_size=GROUP).process({f"mlp.{part}": tensor for part, tensor in parts.items()})
    grid = TensorFormat("int4", GROUP, None, "group", symmetric=False)
    assert torch.equal(codec.decode(ExportedTensor("mlp.weight", "int4", theirs), grid), weight)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Packed in the other way, quantized again, and with groups that are not there."""
    write(tmp_path / "source", "gptq")
    with pytest.raises(UserError, match="already quantized"):
        convert(tmp_path / "source", tmp_path / "target", TensorFormat.int4(32, Convention.exact), lambda _: ROLES, workers=1)
    edit(tmp_path / "source", CONFIGS["awq"])
    with pytest.raises((UserError, UserErrors), match="has qweight of shape"):
        convert(tmp_path / "source", tmp_path / "target", TensorFormat.bf16(), lambda _: (), workers=1)
    edit(tmp_path / "source", CONFIGS["gptq"])
    stored = load_file(tmp_path / "source" / "model.safetensors")
    stored["model.layers.0.mlp.down_proj.g_idx"][3] = 4
    twins.write_weights(tmp_path / "source", stored)
    with pytest.raises(UserError, match=r"down_proj.*g_idx names groups 0 to 4, there are 4"):
        convert(tmp_path / "source", tmp_path / "target", TensorFormat.bf16(), lambda _: (), workers=1)
