"""Tiny checkpoint folders for the converter's tests, and a conversion of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BASE, MLA, MOE

from runner.config.schema import Convention, ModelConfig, PrecisionConfig, Role
from runner.convert.engine import Report, convert
from runner.errors import UserError
from runner.models import family_of
from runner.models.build import build_model, disk_tensors, named_weights, save_config
from runner.precision.plan import quantized_roles
from runner.precision.tensor_format import TensorFormat


def model(family: str, **fields: Any) -> ModelConfig:
    architecture = {"qwen3": {}, "qwen3_moe": MOE, "deepseek": MOE | MLA | {"q_lora_rank": 24}}[family]
    return ModelConfig(**(BASE | architecture | {"name": f"tiny_{family}", "family": family} | fields))


def write_source(folder: Path, config: ModelConfig, shards: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """A bf16 checkpoint of a random tiny model with its tokenizer; returns its weights by on-disk name."""
    folder.mkdir(parents=True)
    built = build_model(config, dtype=torch.bfloat16, seed=seed)
    weights = {n: t.detach().clone() for n, t in disk_tensors(family_of(config), config, named_weights(config, built))}
    save_config(config, folder)
    write_shards(folder, weights, shards)
    return weights


def write_shards(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    """Spread tensors over `shards` files with an index; 1 writes a single file without one."""
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    names = list(weights)
    placed = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        save_file({name: weights[name] for name in names if placed[name] == file}, folder / file, metadata={"format": "pt"})
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder, through safetensors' own reader."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


INT4 = TensorFormat.int4(32, Convention.exact)


def default_roles(config: ModelConfig) -> frozenset[Role]:
    return quantized_roles(config, PrecisionConfig(roles=None))


def run(source: Path, target: Path, tensor_format: TensorFormat = INT4, workers: int = 2) -> Report:
    return convert(source, target, tensor_format, default_roles, workers=workers)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def refused(source: Path, tmp_path: Path, match: str, tensor_format: TensorFormat = INT4) -> UserError:
    """The conversion ends with one message; the source keeps its bytes and no target appears."""
    before = snapshot(source) if source.exists() else None
    with pytest.raises(UserError, match=match) as caught:
        run(source, tmp_path / "target", tensor_format)
    assert not (tmp_path / "target").exists()
    assert (snapshot(source) if source.exists() else None) == before
    return caught.value


def edit_config(source: Path, **changes: object) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))


def shards(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors"))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        flat, other = found[name].contiguous().reshape(-1), tensor.contiguous().reshape(-1)
        assert torch.equal(flat.view(torch.uint8), other.view(torch.uint8)), name
