"""What the converter refuses: one clear message, the source as it was, and no target."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from convert_sources import (
    edit_config,
    model,
    read_all,
    refused,
    run,
    shards,
    write_shards,
    write_source,
)

from runner.config.schema import Convention
from runner.errors import UserError
from runner.precision.tensor_format import TensorFormat


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_source(tmp_path / "source", model("qwen3"))
    return tmp_path / "source"


def test_truncated_shard(source: Path, tmp_path: Path) -> None:
    path = shards(source)[1]
    os.truncate(path, path.stat().st_size - 10)
    refused(source, tmp_path, f"{path.name} cannot be read")


def test_missing_shard(source: Path, tmp_path: Path) -> None:
    shards(source)[1].unlink()
    refused(source, tmp_path, "1 of 3 shards .* missing: model-00002-of-00003")


def test_index_and_shards_disagree(source: Path, tmp_path: Path) -> None:
    shutil.copy(shards(source)[0], shards(source)[1])
    refused(source, tmp_path, "says that model-00002-of-00003.safetensors holds .*, but it does not")


def test_missing_weight(source: Path, tmp_path: Path) -> None:
    weights = read_all(source)
    del weights["model.layers.1.mlp.up_proj.weight"]
    write_shards(source, weights, 3)
    refused(source, tmp_path, "1 weights that config.json implies .*layers.1.mlp.up_proj")


def test_other_shape(source: Path, tmp_path: Path) -> None:
    edit_config(source, intermediate_size=96)
    refused(source, tmp_path, "shape .* config.json implies")


def test_group_that_does_not_divide(tmp_path: Path) -> None:
    write_source(tmp_path / "source", model("qwen3", ffn_size=96))
    error = refused(tmp_path / "source", tmp_path, "down_proj", TensorFormat.int4(64, Convention.exact))
    assert "down_proj" in str(error) and "96 is not a multiple of group_size 64" in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_nan_is_named_whether_quantized_or_copied(source: Path, tmp_path: Path, name: str, value: float) -> None:
    weights = read_all(source)
    weights[name][3, 5] = value
    write_shards(source, weights, 3)
    refused(source, tmp_path, f"{name}.*holds {'NaN' if value != value else 'infinite'}")


def test_already_quantized(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "int4")
    refused(tmp_path / "int4", tmp_path, "already quantized .compressed-tensors")


def test_quantized_without_saying_so(source: Path, tmp_path: Path) -> None:
    weights = read_all(source)
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    write_shards(source, weights, 3)
    refused(source, tmp_path, f"{name} is stored as torch.float8_e4m3fn")


def test_nothing_to_dequantize(source: Path, tmp_path: Path) -> None:
    refused(source, tmp_path, "nothing to bring back", TensorFormat.bf16())


def test_unknown_quantization_method(source: Path, tmp_path: Path) -> None:
    edit_config(source, quantization_config={"quant_method": "hqq"})
    refused(source, tmp_path, "'hqq'", TensorFormat.bf16())


def test_unknown_architecture(source: Path, tmp_path: Path) -> None:
    edit_config(source, architectures=["MambaForCausalLM"])
    error = refused(source, tmp_path, "unknown architecture .*MambaForCausalLM")
    assert error.fix is not None and "Qwen3ForCausalLM" in error.fix


def test_too_little_space(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(usage)(usage.total, usage.total - 1000, 1000))
    refused(source, tmp_path, "GB free")
    assert not list((tmp_path / "target.partial").glob("*.safetensors"))


def test_target_exists(source: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        run(source, tmp_path / "target")
    assert (tmp_path / "target" / "precious").read_text() == "mine"


def test_target_inside_source(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="inside the source"):
        run(source, source / "int4")


def test_no_folder_no_config_no_json(source: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path, "there is no folder")
    (source / "config.json").write_text("{")
    refused(source, tmp_path, "is not JSON")
    (source / "config.json").unlink()
    refused(source, tmp_path, "config.json is missing")


def test_two_processes_cannot_write_one_target(source: Path, tmp_path: Path) -> None:
    from runner.convert.journal import Partial

    with (
        Partial(tmp_path / "target", {"a": 1}),
        pytest.raises(UserError, match="another process"),
        Partial(tmp_path / "target", {"a": 1}),
    ):
        pass
