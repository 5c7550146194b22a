"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner import storage


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with storage.new_folder(tmp_path / "made", durable=True) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("x")
        assert not (tmp_path / "made").exists() and partial.name.startswith(".")
    assert [path.name for path in tmp_path.iterdir()] == ["made"] and (tmp_path / "made" / "inner" / "file").read_text() == "x"


def test_a_folder_whose_filling_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage.new_folder(tmp_path / "made") as partial:
        (partial / "file").write_text("x")
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old").touch()
    with pytest.raises(OSError), storage.new_folder(tmp_path / "made"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "old"]


def test_everything_reaches_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, lists of files, then the folder that the new name stands in."""
    partial, target = tmp_path / "partial", tmp_path / "target"
    (partial / "inner").mkdir(parents=True)
    (partial / "inner" / "file").touch()
    seen: list[tuple[str, bool]] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        seen.append((Path(f"/proc/self/fd/{handle}").readlink().name, target.exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    storage.publish(partial, target, durable=True)
    assert sorted(seen[:-1]) == [("file", False), ("inner", False), ("partial", False)] and seen[-1] == (tmp_path.name, True)
