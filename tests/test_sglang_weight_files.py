"""Weight files of the SGLang pool that need no server: abandoned folders of killed drivers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.rollout.sglang import weight_files


def test_folders_of_dead_drivers_are_removed_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files.tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive = (tmp_path / f"runner-weights-{pid}-x" for pid in (ended.pid, os.getpid()))
    dead.mkdir()
    alive.mkdir()
    made = weight_files.shared_memory_folder(1 << 60)  # more than shared memory has: the temporary folder
    assert made.parent == tmp_path and alive.is_dir() and not dead.exists()
