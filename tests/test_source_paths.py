"""Checkpoint folders whose names and links lead elsewhere: nothing outside source and target is written or copied."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import foreign_sources
import pytest
import torch
from convert_sources import write_source
from foreign_sources import DOWN, run, start

from runner.__main__ import main
from runner.config.schema import ModelConfig
from runner.errors import UserError

dense, source = foreign_sources.dense, foreign_sources.source


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["dotdot", "absolute", "folder", "dots", "empty", "number", "other", "long", "hidden", "null"])
def test_an_index_that_names_files_elsewhere(source: Path, dense: ModelConfig, tmp_path: Path, kind: str) -> None:
    (source / "part").mkdir()
    precious = {"folder": source / "part", "other": source}.get(kind, tmp_path) / "precious.safetensors"
    (source / "model-00002-of-00003.safetensors").rename(precious)
    named: Any = {
        "dotdot": "../precious.safetensors",
        "absolute": str(precious),
        "folder": "part/precious.safetensors",
        "dots": "..",
        "empty": "",
        "number": 5,
        "other": "config.json",
        "long": "x" * 300 + ".safetensors",
        "hidden": ".convert.jsonl.safetensors",
        "null": "a\0.safetensors",
    }[kind]
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {k: named if "-00002-of" in v else v for k, v in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    before = digest(precious)
    for opened in (lambda: run(source, tmp_path / "target"), lambda: start(source, dense)):
        with pytest.raises(UserError, match="files in the folder itself"):
            opened()
    assert main(["convert", f"source={source}", f"target={tmp_path / 'target'}"]) == 2
    assert digest(precious) == before and not (tmp_path / "target.partial").exists()


def test_links_in_an_unfinished_target_are_not_written_through(source: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    partial = tmp_path / "target.partial"
    for name, to in (
        ("model-00001-of-00003.safetensors", precious / "file"),
        (".convert.jsonl", precious / "file"),
        ("x", precious),
    ):
        partial.mkdir()
        (partial / name).symlink_to(to)
        with pytest.raises(UserError, match="is a link"):
            run(source, tmp_path / "target")
        shutil.rmtree(partial)
    for name in ("target.partial", "target"):
        (tmp_path / name).symlink_to(precious)
        with pytest.raises(UserError, match="is a link"):
            run(source, tmp_path / "target")
        (tmp_path / name).unlink()
    assert [path.name for path in precious.iterdir()] == ["file"] and (precious / "file").read_text() == "mine"


def test_a_file_that_shares_its_bytes_is_not_written_into(source: Path, tmp_path: Path) -> None:
    (tmp_path / "target.partial").mkdir()
    os.link(source / "model-00001-of-00003.safetensors", tmp_path / "target.partial" / "model-00001-of-00003.safetensors")
    os.link(source / "tokenizer.json", tmp_path / "target.partial" / "tokenizer.json")
    before = {path.name: digest(path) for path in source.iterdir()}
    run(source, tmp_path / "target")
    assert {path.name: digest(path) for path in source.iterdir()} == before


@pytest.mark.parametrize("source_name", ["target.partial", "target.partial/inner", "target/inner"])
def test_a_source_that_the_target_would_overwrite(tmp_path: Path, dense: ModelConfig, source_name: str) -> None:
    folder = tmp_path / source_name
    write_source(folder, dense)
    before = {path.name: digest(path) for path in folder.iterdir()}
    with pytest.raises(UserError, match="inside"):
        run(folder, tmp_path / "target")
    assert {path.name: digest(path) for path in folder.iterdir()} == before


@pytest.mark.parametrize("target", ["", "..", "/"])
def test_targets_that_are_no_name(source: Path, target: str) -> None:
    with pytest.raises(UserError):
        run(source, Path(target))


def test_links_that_leave_the_source_are_not_copied(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "folder").mkdir()
    led = {"notes.txt": tmp_path / "secret", "gone": tmp_path / "nowhere", "all": tmp_path / "folder", "loop": Path("loop")}
    for name, to in led.items():
        (source / name).symlink_to(to)
        with pytest.raises(UserError, match=f"links that lead out of it or to folders: {name}"):
            run(source, tmp_path / "target")
        (source / name).unlink()
    shutil.rmtree(tmp_path / "target.partial", ignore_errors=True)
    (source / "tokenizer.json").rename(source / "real.json")
    (source / "tokenizer.json").symlink_to("real.json")
    run(source, tmp_path / "target")
    assert not (tmp_path / "target" / "tokenizer.json").is_symlink()


def test_a_hub_cache_is_a_source_although_its_files_are_links(source: Path, dense: ModelConfig, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sorted(source.iterdir()):
        blob = blobs / digest(path)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    run(snapshot, tmp_path / "from_cache")
    run(source, tmp_path / "from_folder")
    for path in (tmp_path / "from_folder").iterdir():
        assert (tmp_path / "from_cache" / path.name).read_bytes() == path.read_bytes(), path.name
    assert torch.equal(start(snapshot, dense)[f"{DOWN}.weight"], start(source, dense)[f"{DOWN}.weight"])
