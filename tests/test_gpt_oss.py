"""gpt-oss in MXFP4 as a closed loop: the published layout -> masters -> QAT -> engine -> the published layout, bit for bit.

What every family shows (logits, windows, routes, conversions, three steps of RL) is in test_family_*.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_sources import read_all, write_shards
from safetensors.torch import load_file
from transformers import Mxfp4Config

from runner.__main__ import main
from runner.config import compose
from runner.config.schema import Config, Convention, ModelConfig, PrecisionConfig
from runner.convert.compare import audit_checkpoint, compare_checkpoints
from runner.convert.engine import convert
from runner.errors import UserError, UserErrors
from runner.models import family_of, stacks
from runner.models.build import build_model, disk_tensors, named_weights
from runner.precision import codec, fp4
from runner.precision.plan import PrecisionPlan, quantized_roles
from runner.precision.tensor_format import TensorFormat
from runner.rollout.local.pool import LocalPool
from runner.run import export
from runner.trainer.torch.trainer import TorchTrainer
from tests import twins
from tests.trainer_configs import batch

PUBLISHED = twins.PUBLISHED["gpt_oss"]["quantization_config"]
STACKS = ("gate_up_proj", "down_proj")
MXFP4, BF16 = TensorFormat.mxfp4(), TensorFormat.bf16()


def roles(model: ModelConfig) -> Any:
    return quantized_roles(model, PrecisionConfig(roles=None))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt_oss") / "published"
    twins.mxfp4_twin(folder)
    return folder


def by_transformers(folder: Path, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    quantized = "quantization_config" in json.loads((folder / "config.json").read_text())
    how = {"quantization_config": Mxfp4Config(dequantize=True)} if quantized else {}
    return twins.loaded_by_transformers(folder, dtype=dtype, **how)


def as_in_transformers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In-memory weights of this program under transformers' names, in its layout: [E, in, out], rows of a gate taking turns."""
    found = {}
    for name, weight in weights.items():
        if "gate_up_proj" in name:
            weight = torch.stack(weight.chunk(2, dim=1), dim=2).flatten(1, 2)
        found[name] = weight.transpose(1, 2) if name.endswith(STACKS) else weight
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def every_code_under(scales: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [len(scales), 32] and scales [len(scales), 1]: both signs of every value in each group."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(len(scales), 2)
    return codes, torch.tensor(list(scales), dtype=torch.uint8).unsqueeze(-1)


def test_every_product_with_a_power_of_two_is_exact() -> None:
    codes, scales = every_code_under(range(253))
    exact = fp4.decode_fp4(codes).double() * torch.exp2(scales.double() - 127)
    assert torch.equal(fp4.dequantize_mxfp4(codes, scales).double(), exact)
    assert int(fp4.mxfp4_scales(torch.full((1, 32), 2.5e38, dtype=torch.bfloat16))) == 252


@pytest.mark.parametrize("largest", range(8))
def test_whatever_scale_a_folder_has_its_weights_stay_the_same_bits(largest: int) -> None:
    """Codes up to `largest` under every scale, quantized again; from a code of 4 on, codes and scale are the same, too."""
    codes, scales = every_code_under(range(253))
    codes = torch.where((codes & 7) <= largest, codes, codes & 8)
    weight = fp4.dequantize_mxfp4(codes, scales)
    again, derived = fp4.quantize_mxfp4(weight)
    assert torch.equal(fp4.dequantize_mxfp4(again, derived).view(torch.int16), weight.view(torch.int16))
    if largest >= 6:
        assert torch.equal(again, codes) and torch.equal(derived, scales)


def test_the_reader_gives_transformers_numbers(published: Path) -> None:
    """Every weight bit for bit, and the logits (fp32, 1e-4)."""
    model, theirs = twins.model_of(published), by_transformers(published)
    ours = build_model(model, dtype=torch.bfloat16, seed=0)
    assert same(as_in_transformers(dict(named_weights(model, ours))), dict(theirs.state_dict()))
    tokens = torch.arange(40).reshape(2, 20) * 7 % 272
    with torch.no_grad():
        difference = (ours.float()(tokens).logits - theirs.float()(tokens).logits).abs().max()
    assert difference < 1e-4


def test_to_bf16_and_back(published: Path, tmp_path: Path) -> None:
    """transformers reads both; the second MXFP4 folder has the first one's weights, and a third one has its bytes."""
    convert(published, tmp_path / "bf16", BF16, lambda _: (), workers=2)
    theirs = dict(by_transformers(published).state_dict())
    assert same(theirs, dict(by_transformers(tmp_path / "bf16").state_dict()))
    assert load_file(tmp_path / "bf16" / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"].shape == (8, 64, 256)
    convert(tmp_path / "bf16", tmp_path / "mxfp4", MXFP4, roles, workers=2)
    assert json.loads((tmp_path / "mxfp4" / "config.json").read_text())["quantization_config"] == PUBLISHED
    assert same(theirs, dict(by_transformers(tmp_path / "mxfp4").state_dict()))
    convert(tmp_path / "mxfp4", tmp_path / "again", BF16, lambda _: (), workers=2)
    convert(tmp_path / "again", tmp_path / "third", MXFP4, roles, workers=2)
    assert compare_checkpoints(tmp_path / "mxfp4", tmp_path / "third") == []
    first, second = load_file(published / "model.safetensors"), load_file(tmp_path / "mxfp4" / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in first.items()} == {n: (t.shape, t.dtype) for n, t in second.items()}
    plan = PrecisionPlan.with_format(twins.model_of(published), MXFP4, roles(twins.model_of(published)))
    assert audit_checkpoint(plan, published) == audit_checkpoint(plan, tmp_path / "mxfp4") == []


def test_to_int4_and_back_over_shards_that_cut_the_experts(published: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already quantized"):
        convert(published, tmp_path / "int4", TensorFormat.int4(32, Convention.exact), roles, workers=1)
    convert(published, tmp_path / "bf16", BF16, lambda _: (), workers=1)
    model = twins.model_of(tmp_path / "bf16")
    cfg = compose.load_config(["precision=int4_qat", "precision.group_size=32"])
    plan = PrecisionPlan.with_format(model, TensorFormat.of(cfg.precision.rollout), roles(model))
    report = convert(tmp_path / "bf16", tmp_path / "int4", TensorFormat.of(cfg.precision.rollout), roles, workers=2)
    assert any("one by one" in note for note in report.notes) and audit_checkpoint(plan, tmp_path / "int4") == []
    tensors = read_all(tmp_path / "int4")
    (tmp_path / "int4" / "model.safetensors").unlink()
    write_shards(tmp_path / "int4", tensors, 5)
    convert(tmp_path / "int4", tmp_path / "back", BF16, lambda _: (), workers=2)
    weights = twins.weights_of(tmp_path / "bf16")
    effective = {
        item.name: codec.decode(item, plan.tensors[item.name])
        for item in codec.encode_all([(name, weights[name]) for name in plan.quantized], plan)
    }
    found = dict(by_transformers(tmp_path / "back").state_dict())
    original = build_model(model, dtype=torch.bfloat16, seed=0)
    views = dict(disk_tensors(family_of(model), model, named_weights(model, original)))
    for name, weight in effective.items():
        views[name].copy_(weight)
    assert same(as_in_transformers(dict(named_weights(model, original))), found)


def closed_loop(folder: Path) -> Config:
    overrides = ["model=auto", f"model.hf_checkpoint={folder}", "precision=mxfp4_qat", "run=toy", "speculative=none"]
    return compose.load_config([*overrides, "trainer.threads=1", "task=arithmetic"])


def test_source_masters_engine_and_export_hold_the_same_bits(published: Path, tmp_path: Path) -> None:
    """Before an update the published weights; after one, what the optimizer's step quantized once, on every side."""
    cfg = closed_loop(published)
    trainer, pool = TorchTrainer(cfg), LocalPool(cfg)
    source = dict(by_transformers(published).state_dict())
    for version in range(2):
        if version:
            trainer.step(batch(cfg, routes=True))
        report = pool.update_weights(version, trainer.export())
        assert report.problems == [] and report.resident_checked
        memory = dict(named_weights(cfg.model, trainer.model))
        trained = as_in_transformers(memory)
        assert same(trained, source) == (not version)
        views = dict(disk_tensors(family_of(cfg.model), cfg.model, memory.items()))
        matrices = [name for name, tensor_format in pool.plan.tensors.items() if tensor_format.quantized]
        assert all(torch.equal(pool.effective_weight(name), views[name]) for name in matrices) and len(matrices) == 48
        checkpoint = tmp_path / f"checkpoint_{version}"
        checkpoint.mkdir()
        trainer.save(checkpoint)
        target = tmp_path / f"exported_{version}"
        export.write(cfg, export.plan_of(cfg, None), export._weights(cfg, checkpoint), target)
        assert json.loads((target / "config.json").read_text())["quantization_config"] == PUBLISHED
        assert same(dict(by_transformers(target).state_dict()), trained)
        assert same(dict(by_transformers(checkpoint).state_dict()), trained) == (not version)


def test_a_stack_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    twins.mxfp4_twin(tmp_path / "published")
    values = json.loads((tmp_path / "published" / "config.json").read_text())
    (tmp_path / "published" / "config.json").write_text(json.dumps(values | {"num_local_experts": 4}))
    with pytest.raises(UserError, match=r"gate_up_proj_blocks has shape \(8, 256, 2, 16\), config.json implies 4 experts"):
        convert(tmp_path / "published", tmp_path / "target", BF16, lambda _: (), workers=1)


def test_gptq_is_refused_before_it_asks_for_its_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twins.twin(tmp_path / "source", "gpt_oss")
    words = ["convert", f"source={tmp_path / 'source'}", f"target={tmp_path / 'target'}", "precision=int4_qat", "method=gptq"]
    assert main(words) == 2
    assert "transformers has all experts of gpt_oss in one" in " ".join(capsys.readouterr().err.split())


def test_an_export_without_an_expert_is_no_folder() -> None:
    model = compose.load_config(["model=tiny_gpt_oss"]).model
    parameters = {parameter.name: parameter for parameter in family_of(model).parameters(model)}
    name = "model.layers.0.mlp.experts.0.down_proj"
    parts = {f"{name}.weight": torch.zeros(128, 128), f"{name}.bias": torch.zeros(128), "model.norm.weight": torch.ones(128)}
    laid = stacks.laid([parts], parameters)
    assert list(next(laid)) == ["model.norm.weight"]
    with pytest.raises(UserError, match="experts.down_proj, .*down_proj_bias: weights of some experts are missing"):
        next(laid)


@pytest.mark.parametrize(
    "other", [["trainer=megatron", "parallelism=h200x1"], ["trainer=megatron", "parallelism=cpu2"], ["rollout=sglang"]]
)
def test_engines_that_cannot_say_why(other: list[str]) -> None:
    with pytest.raises(UserErrors, match="gpt_oss.*sinks"):
        compose.load(["model=tiny_gpt_oss", "precision=mxfp4_qat", "speculative=none", *other])


def test_doctor_recovers_the_engines_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "engine", "model=tiny_gpt_oss", "precision=mxfp4_qat"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "engine: routed_expert mxfp4 ok 96 weights recovered, equal bit for bit" in shown
