"""`runner convert` and `runner audit` as a user types them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_sources import model, read_all, write_shards, write_source

from runner.__main__ import main
from runner.config import compose
from runner.convert.grid import default_group_size


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_source(tmp_path / "source", model("qwen3_moe"))
    return tmp_path / "source"


def convert(source: Path, target: Path, *overrides: str) -> int:
    return main(["convert", f"source={source}", f"target={target}", *overrides])


def test_there_and_back_and_what_it_prints(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(source, tmp_path / "int4", "precision=int4_qat", "precision.group_size=64") == 0
    text = capsys.readouterr().out
    assert "routed_expert: int4 group 64 exact" in text and "24" in text and "GB/s" in text
    weights = json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert weights["weights"]["group_size"] == 64
    assert convert(tmp_path / "int4", tmp_path / "bf16", "precision=bf16") == 0
    assert {tensor.dtype for tensor in read_all(tmp_path / "bf16").values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["fp8_channel", "fp8_tensor", "mxfp4", "nvfp4"])
def test_formats_by_name(source: Path, tmp_path: Path, name: str) -> None:
    assert convert(source, tmp_path / "target", f"format={name}") == 0


def test_the_group_size_is_the_sources_own_unless_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def group_size(folder: str) -> int:
        config = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        return config["config_groups"]["group_0"]["weights"]["group_size"]

    write_source(tmp_path / "wide", model("qwen3", hidden_size=128, ffn_size=256))
    write_source(tmp_path / "narrow", model("qwen3", hidden_size=64, ffn_size=96))
    assert convert(tmp_path / "wide", tmp_path / "a") == convert(tmp_path / "narrow", tmp_path / "b") == 0
    text = capsys.readouterr().out
    assert "int4 in groups of 128: the largest of 128, 64 and 32" in text and "int4 in groups of 32" in text
    assert (group_size("a"), group_size("b")) == (128, 32)
    assert main(["audit", str(tmp_path / "a"), "precision=int4_qat"]) == 0
    capsys.readouterr()
    assert convert(tmp_path / "wide", tmp_path / "c", "precision.group_size=64") == 0
    assert convert(tmp_path / "wide", tmp_path / "d", "model=tiny_dense") == 0
    assert "in groups of" not in capsys.readouterr().out
    assert (group_size("c"), group_size("d")) == (64, 32)


@pytest.mark.parametrize(
    ("name", "size"), [("kimi_k2_thinking", 32), ("qwen3_30b", 128), ("moonlight_16b", 128), ("tiny_moe", 32)]
)
def test_shipped_models_are_recognized(name: str, size: int) -> None:
    cfg = compose.load([f"model={name}"]).config
    assert default_group_size(replace(cfg.model, name="a_folder"), cfg.precision) == (size, f"what conf/model/{name}.yaml has")


def test_roles_widen_the_quantized_set(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "target", "precision.roles=[routed_expert,attention]") == 0
    names = read_all(tmp_path / "target")
    assert "model.layers.0.self_attn.q_proj.weight_packed" in names and "model.layers.0.mlp.gate.weight" in names


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["format=int8"], "precision.convention=llmcompressor"),
        (["format=int3"], "unknown format 'int3'"),
        (["method=magic"], "convert.method: magic is none of rtn, gptq"),
        (["method=gptq", "gptq_python=nowhere"], "make setup-gptq"),
        (["workers=0"], "convert.workers"),
        (["precision.group_size=256"], "not a multiple of group_size 256"),
        (["precision.roles=[router]"], "never quantized"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(
    source: Path, tmp_path: Path, overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, tmp_path / "target", *overrides) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_audit_of_two_folders(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(source, tmp_path / "a") == convert(source, tmp_path / "b") == 0
    assert main(["audit", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    tensors = read_all(tmp_path / "b")
    name = "model.layers.1.mlp.experts.2.up_proj.weight_packed"
    tensors[name][3, 4] ^= 1
    write_shards(tmp_path / "b", tensors, 3)
    capsys.readouterr()
    assert main(["audit", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    text = capsys.readouterr().out
    assert f"{name}: 1 of 4096 values differ" in text and "1 differences" in text


def test_audit_names_other_grids_and_sets(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(source, tmp_path / "a")
    convert(source, tmp_path / "b", "precision.group_size=16")
    convert(source, tmp_path / "c", "precision.roles=[routed_expert,attention]")
    capsys.readouterr()
    assert main(["audit", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "group_size" in capsys.readouterr().out
    assert main(["audit", str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    assert "attention" in capsys.readouterr().out
    assert main(["audit", str(source), str(tmp_path / "a")]) == 1
    assert "routed_expert" in capsys.readouterr().out


def test_audit_of_a_folder_and_a_config(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(source, tmp_path / "a", "precision.group_size=32")
    assert main(["audit", str(tmp_path / "a"), "precision=int4_qat", "precision.group_size=32"]) == 0
    assert main(["audit", str(tmp_path / "a"), "precision=int4_qat", "precision.group_size=64"]) == 1
    assert main(["audit", str(tmp_path / "a"), "precision=int4_qat", "precision.convention=kimi"]) == 1
    assert main(["audit", str(tmp_path / "a"), "precision=fp8"]) == 1
    capsys.readouterr()


def test_audit_usage(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(source)]) == 2
    assert "DIR DIR" in capsys.readouterr().err
    shutil.rmtree(source)
    assert main(["audit", str(source), "precision=int4_qat"]) == 2
    assert "there is no folder" in capsys.readouterr().err
