"""Weights straight from HF folders into every kind of shard and back, bit for bit; INT4 and FP8 are dequantized on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runner.config.schema import Config
from runner.errors import UserError
from runner.run import export
from runner.trainer.torch.trainer import TorchTrainer
from tests.megatron_trainer.configs import MODELS, megatron_config
from tests.megatron_trainer.scenario import exported, megatron
from tests.trainer_configs import config

pytestmark = pytest.mark.megatron


def _hf_folder(model: str, folder: Path, format: str) -> Config:
    cfg = config(MODELS[model], format="bf16" if format == "bf16" else "int4")
    trainer = TorchTrainer(cfg)
    weights = {name: part for tensor in trainer.export("bf16") for name, part in tensor.parts.items()}
    export.write(cfg, export.plan_of(cfg, format), weights.items(), folder)
    return cfg


@pytest.mark.parametrize(("model", "layout"), [("moe", "mix4"), ("mla_q", "etp2"), ("dense", "pp2"), ("mtp", "tp2")])
def test_a_round_trip_changes_no_bit(model: str, layout: str, tmp_path: Path) -> None:
    _hf_folder(model, tmp_path / "hf", "bf16")
    with megatron(megatron_config(model, layout, format="bf16", **{"model.hf_checkpoint": str(tmp_path / "hf")})) as trainer:
        back = exported(trainer, "bf16")
    there = load_file(tmp_path / "hf" / "model.safetensors")
    assert back.keys() == there.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in there.items())


@pytest.mark.parametrize("format", ["int4", "fp8"])
def test_quantized_folders_are_dequantized_on_the_way(format: str, tmp_path: Path) -> None:
    """And quantizing the result again gives the INT4 folder's integers and scales: the grid is its own fixed point."""
    cfg = _hf_folder("moe", tmp_path / "hf", format)
    _hf_folder("moe", tmp_path / "plain", "bf16")
    there = load_file(tmp_path / "hf" / "model.safetensors")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    changes = {"format": "int4" if format == "int4" else "bf16", "model.hf_checkpoint": str(tmp_path / "hf")}
    with megatron(megatron_config("moe", "tp2_sp", **changes)) as trainer:
        loaded, packed = exported(trainer, "bf16"), exported(trainer, "rollout")
    assert loaded.keys() == plain.keys()
    quantized = set(export.plan_of(cfg, format).quantized)
    for name, tensor in loaded.items():
        distance = (tensor.float() - plain[name].float()).abs().max() / plain[name].float().abs().max()
        assert (0 < distance < 0.2) if name in quantized else distance == 0, name
    if format == "int4":
        assert all(torch.equal(packed[name], tensor) for name, tensor in there.items())


def test_a_folder_of_another_architecture_is_refused(tmp_path: Path) -> None:
    _hf_folder("dense", tmp_path / "hf", "bf16")
    with pytest.raises(UserError, match="Qwen3ForCausalLM"):
        megatron_with = megatron_config("moe", "single", format="bf16", **{"model.hf_checkpoint": str(tmp_path / "hf")})
        with megatron(megatron_with):
            pass
