"""Tiny checkpoint folders for the converter's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import BASE, MLA, MOE

from runner.config.schema import ModelConfig
from runner.models import family_of
from runner.models.build import build_model, disk_tensors, named_weights, save_config


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
