"""What tests of foreign checkpoint folders share. Each of them takes the two fixtures by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_sources import model, read_all, write_shards, write_source

from runner.__main__ import main
from runner.config.schema import Convention, ModelConfig, PrecisionConfig, Role
from runner.convert.engine import Report, convert
from runner.errors import UserError
from runner.models.build import build_model
from runner.precision.plan import quantized_roles
from runner.precision.tensor_format import TensorFormat

INT4 = TensorFormat.int4(32, Convention.exact)
BF16 = TensorFormat.bf16()
DOWN = "model.layers.1.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


def default_roles(config: ModelConfig) -> frozenset[Role]:
    return quantized_roles(config, PrecisionConfig(roles=None))


def run(source: Path, target: Path, tensor_format: TensorFormat = INT4) -> Report:
    return convert(source, target, tensor_format, default_roles, workers=1)


def start(source: Path, config: ModelConfig) -> Tensors:
    """What a trainer starts from."""
    return dict(build_model(replace(config, hf_checkpoint=str(source)), dtype=torch.bfloat16, seed=1).named_parameters())


def refused_everywhere(source: Path, config: ModelConfig, tmp_path: Path, words: str) -> None:
    """By the converter in both directions, by the start of a run, and by the audit, which lists it."""
    for tensor_format in (BF16, INT4):
        with pytest.raises(UserError) as caught:
            run(source, tmp_path / "refused", tensor_format)
        assert words in str(caught.value) or "already quantized" in str(caught.value)
        assert not (tmp_path / "refused").exists() and not (tmp_path / "refused.partial").exists()
    with pytest.raises(UserError) as caught:
        start(source, config)
    assert words in str(caught.value)
    assert main(["audit", str(source), str(source)]) in (1, 2)  # differences, or a folder that cannot be opened


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = read_all(folder)
    edit(tensors)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    write_shards(folder, {name: tensor.contiguous() for name, tensor in tensors.items()}, 3)


@pytest.fixture
def dense() -> ModelConfig:
    return model("qwen3", hidden_size=128, ffn_size=256, head_dim=32)


@pytest.fixture
def source(tmp_path: Path, dense: ModelConfig) -> Path:
    write_source(tmp_path / "source", dense)
    return tmp_path / "source"
