"""Converted checkpoints compute what the fake-quantized model computes, and hold what the trainer exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_sources import assert_same, default_roles, model, read_all, run, write_shards, write_source
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from runner.config.schema import Convention, ModelConfig
from runner.models import family_of
from runner.models.build import disk_tensors, save_config
from runner.precision import codec
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat
from runner.trainer.torch.trainer import TorchTrainer
from tests.trainer_configs import DENSE, MLA, MOE, batch, config

GRIDS = {
    "exact_32": TensorFormat.int4(32, Convention.exact),
    "kimi_32": TensorFormat.int4(32, Convention.kimi),
    "llmcompressor_64": TensorFormat.int4(64, Convention.llmcompressor),
    "exact_channel": TensorFormat.int4(-1, Convention.exact),
    "int8_32": TensorFormat.int8(32, Convention.llmcompressor),
    "fp8_block": TensorFormat.fp8("block"),
    "fp8_channel": TensorFormat.fp8("channel"),
    "fp8_tensor": TensorFormat.fp8("tensor"),
    "mxfp4": TensorFormat.mxfp4(),
    "nvfp4": TensorFormat.nvfp4(),
}
# transformers 5.19 gathers packed weights, scales and shapes of fused experts, but not their weight_global_scale
UNREADABLE = {("qwen3_moe", "nvfp4")}
CASES = [
    pytest.param(
        family,
        name,
        marks=pytest.mark.xfail(strict=True, reason="transformers drops the experts' weight_global_scale")
        if (family, name) in UNREADABLE
        else (),
    )
    for family in ("qwen3", "qwen3_moe")
    for name in GRIDS
]


def logits_of(folder: Path, **arguments: object) -> tuple[torch.nn.Module, torch.Tensor]:
    tokens = torch.arange(40).reshape(2, 20) * 7 % 272
    built = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager", **arguments).eval()
    with torch.no_grad():
        return built, built(tokens).logits


def fake_quantized_logits(folder: Path, config: ModelConfig, plan: PrecisionPlan) -> tuple[torch.nn.Module, torch.Tensor]:
    """The bf16 model with every quantized weight replaced by its effective value."""
    tokens = torch.arange(40).reshape(2, 20) * 7 % 272
    built = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    with torch.no_grad():
        views = dict(disk_tensors(family_of(config), config, built.state_dict().items()))
        quantized = [(name, view) for name, view in views.items() if name in plan.quantized]
        for exported in codec.encode_all(quantized, plan):
            views[exported.name].copy_(codec.decode(exported, plan.tensors[exported.name]))
        return built, built(tokens).logits


@pytest.mark.parametrize(("family", "grid_name"), CASES)
def test_transformers_loads_it_and_gives_the_fake_quantized_logits(tmp_path: Path, family: str, grid_name: str) -> None:
    """Tolerance zero: compressed-tensors (and transformers' own reader of FP8 blocks) dequantizes to bf16(value * scale),
    which is our effective weight bit for bit, and the two models then run the same operators on the same weights.

    Except the dense model with FP8 channels or tensors: transformers keeps the fp32 scales in the model's bf16, so its weights
    are within one bf16 step (2^-7) of ours, and compressed-tensors quantizes the activations of these linears as the
    checkpoint's config says, so logits agree to FP8 noise only. On a CPU all formats are dequantized when loaded.
    """
    tiny, grid = model(family), GRIDS[grid_name]
    write_source(tmp_path / "source", tiny)
    run(tmp_path / "source", tmp_path / "target", grid)
    plan = PrecisionPlan.with_format(tiny, grid, default_roles(tiny))
    # FP8 blocks are not compressed-tensors: transformers reads them by the checkpoint's config, with accelerate
    how = {} if grid_name == "fp8_block" else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    loaded, logits = logits_of(tmp_path / "target", **how)
    expected, expected_logits = fake_quantized_logits(tmp_path / "source", tiny, plan)
    rounded_scales = family == "qwen3" and grid_name in ("fp8_channel", "fp8_tensor")
    torch.testing.assert_close(logits, expected_logits, rtol=0.0, atol=0.1 if rounded_scales else 0.0)
    found = dict(disk_tensors(family_of(tiny), tiny, loaded.state_dict().items()))
    for name, tensor in disk_tensors(family_of(tiny), tiny, expected.state_dict().items()):
        if name in plan.tensors:
            step = 2**-7 if rounded_scales and name in plan.quantized else 0.0
            torch.testing.assert_close(found[name].to(tensor.dtype), tensor, rtol=step, atol=0.0, msg=name)
    _, original = logits_of(tmp_path / "source")
    assert not torch.equal(logits, original)  # quantization did something


@pytest.mark.parametrize("format_name", ["int4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("architecture", [MOE, DENSE, MLA], ids=["moe", "dense", "mla"])
def test_converter_and_trainer_export_are_identical(tmp_path: Path, architecture: dict, format_name: str) -> None:
    """After real optimizer steps: converting the trainer's bf16(master) gives the integers and scales that it streams to
    the engine, and those decode to the weights that its forward computes with."""
    cfg = config(architecture, format=format_name)
    trainer = TorchTrainer(cfg)
    try:
        for seed in range(2):
            step = batch(cfg, seed=seed)
            trainer.step(replace(step, old_logprobs=trainer.logprobs(step)))
        masters = {name: part for tensor in trainer.export("bf16") for name, part in tensor.parts.items()}
        exported = list(trainer.export())
        live = {n: t.clone() for n, t in disk_tensors(family_of(cfg.model), cfg.model, trainer.model.state_dict().items())}
    finally:
        trainer.close()
    source = tmp_path / "source"
    source.mkdir()
    save_config(cfg.model, source)
    write_shards(source, {name: tensor.contiguous() for name, tensor in masters.items()}, 2)
    run(source, tmp_path / "target", TensorFormat.of(cfg.precision.rollout))
    written = read_all(tmp_path / "target")
    assert_same(written, {name: part for tensor in exported for name, part in tensor.parts.items()})
    plan = PrecisionPlan.build(cfg.model, cfg.precision, "rollout")
    assert json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"] == plan.quantization_config()
    quantized = [tensor for tensor in exported if plan.tensors[tensor.name].quantized]
    assert quantized
    for tensor in quantized:
        assert torch.equal(codec.decode(tensor, plan.tensors[tensor.name]), live[tensor.name]), tensor.name
