"""`runner export`: the folder equals what the trainer streams and what the converter makes of the BF16 export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runner.__main__ import main
from runner.config.schema import Config, ModelConfig
from runner.convert.compare import compare_checkpoints
from runner.convert.engine import convert
from runner.errors import UserError
from runner.models.build import build_model
from runner.precision.plan import quantized_roles
from runner.run import export
from runner.trainer.torch.trainer import TorchTrainer
from tests.trainer_configs import MLA, MOE, batch, config


def _trained(cfg: Config, folder: Path) -> TorchTrainer:
    trainer = TorchTrainer(cfg)
    trainer.step(batch(cfg))
    folder.mkdir()
    trainer.save(folder)
    return trainer


def _written(cfg: Config, checkpoint: Path, target: Path, format: str | None) -> dict[str, torch.Tensor]:
    export.write(cfg, export.plan_of(cfg, format), export._weights(cfg, checkpoint), target)
    files = sorted(target.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("model", [MOE, MLA])
def test_the_folder_holds_what_the_engine_got(model: dict[str, object], tmp_path: Path) -> None:
    cfg = config({**model, "expert_ffn_size": 64, "hidden_size": 64})
    trainer = _trained(cfg, tmp_path / "checkpoint")
    for format, name in ((None, "rollout"), ("bf16", "bf16")):
        written = _written(cfg, tmp_path / "checkpoint", tmp_path / name, format)
        streamed = {n: part for tensor in trainer.export(name) for n, part in tensor.parts.items()}  # type: ignore[arg-type]
        assert written.keys() == streamed.keys()
        assert all(torch.equal(written[n], part) for n, part in streamed.items())


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_it_is_what_the_converter_makes_of_bf16(tmp_path: Path, format: str) -> None:
    cfg = config()
    _trained(cfg, tmp_path / "checkpoint")
    _written(cfg, tmp_path / "checkpoint", tmp_path / "bf16", "bf16")
    _written(cfg, tmp_path / "checkpoint", tmp_path / format, format)
    tensor_format = next(iter(export.plan_of(cfg, format).quantized.values()))

    def roles(model: ModelConfig) -> list[object]:
        return list(quantized_roles(model, cfg.precision))

    convert(tmp_path / "bf16", tmp_path / "converted", tensor_format, roles, workers=1)  # type: ignore[arg-type]
    assert compare_checkpoints(tmp_path / format, tmp_path / "converted") == []


def test_shards_and_their_index_load_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    cfg = config()
    trainer = _trained(cfg, tmp_path / "checkpoint")
    written = _written(cfg, tmp_path / "checkpoint", tmp_path / "out", "bf16")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3 and index["weight_map"].keys() == written.keys()
    model = ModelConfig(**{**MOE, "hf_checkpoint": str(tmp_path / "out")})  # type: ignore[arg-type]
    loaded = build_model(model, dtype=torch.bfloat16, seed=0)
    for name, tensor in loaded.named_parameters():
        if name in trainer.optimizer.masters:
            assert torch.equal(tensor, trainer.optimizer.masters[name].to(torch.bfloat16)), name


def test_a_weight_that_is_missing_stops_the_export(tmp_path: Path) -> None:
    cfg = config()
    _trained(cfg, tmp_path / "checkpoint")
    weights = [item for item in export._weights(cfg, tmp_path / "checkpoint") if "experts.2.up" not in item[0]]
    with pytest.raises(UserError, match=r"experts\.2\.up_proj"):
        export.write(cfg, export.plan_of(cfg, "bf16"), weights, tmp_path / "out")
    more = [*export._weights(cfg, tmp_path / "checkpoint"), ("model.layers.9.mlp.up_proj.weight", torch.ones(2, 2))]
    with pytest.raises(UserError, match=r"layers\.9\.mlp\.up_proj\.weight is not a parameter"):  # nor is one left over
        export.write(cfg, export.plan_of(cfg, "bf16"), more, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["target=x"], "needs run="),
        (["run=x"], "needs target="),
        (["run=x", "traget=y"], "did you mean target=y?"),
        (["run=x", "target=y", "format=int5"], "unknown format"),
        (["run=x", "target=y", "step=last"], "not a step"),
        (["run"], "not key=value"),
        (["run=x", "target=.", "step=last"], "2 problems"),
    ],
)
def test_mistakes_of_the_command(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *argv]) == 2
    assert message in capsys.readouterr().err
