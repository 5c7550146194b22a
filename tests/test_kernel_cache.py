"""The engine's CPU kernels lie in several files, and compiled code holds what it calls: an edit anywhere compiles anew."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import runner
from runner.rollout.local import cpu_kernels

FOLDER = Path(cpu_kernels.__file__).parent
HALVED = "    return np.float32(0.5) * value * _float("
PROGRAM = """
import numpy as np
from runner.rollout.local.cpu_kernels import experts, layers
both, inner = np.ones((1, 32), np.float32), np.empty((1, 16), np.float32)
experts.gate_activation(both, inner)
stats = experts.gate_activation.stats
print(inner[0, 0], sum(stats.cache_hits.values()), sum(stats.cache_misses.values()), experts.__file__)
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The kernels alone in a tree of their own, without what was compiled here."""
    folder = tmp_path / FOLDER.relative_to(Path(runner.__file__).parents[1])
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for parent in folder.relative_to(tmp_path).parents[:-1]:
        (tmp_path / parent / "__init__.py").touch()
    return folder


def activate(copy: Path, tmp_path: Path) -> tuple[float, int, int]:
    """silu(1) as gate_activation computes it in a fresh process; how often it was loaded, and compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    value, hits, misses, file = result.stdout.split()
    assert Path(file).parent == copy
    return float(value), int(hits), int(misses)


@pytest.mark.slow
def test_an_edited_helper_compiles_its_callers_in_other_files_anew(copy: Path, tmp_path: Path) -> None:
    silu = pytest.approx(1 / (1 + 2.718281828**-1), rel=1e-6)
    assert activate(copy, tmp_path) == (silu, 0, 1)
    assert activate(copy, tmp_path) == (silu, 1, 0)
    helper = copy / "lanes.py"
    text = helper.read_text()
    assert text.count("    return value * _float(") == 1  # the last line of exp, which experts.py calls
    helper.write_text(text.replace("    return value * _float(", HALVED))
    halved = pytest.approx(1 / (1 + 2.718281828**-1 / 2), rel=1e-6)
    assert activate(copy, tmp_path) == (halved, 0, 1)
    assert activate(copy, tmp_path) == (halved, 1, 0)


def test_every_kernel_is_kept_by_the_stamp_of_the_folder() -> None:
    """A kernel that asked numba itself for a cache would be kept by its own file's stamp alone."""
    for path in FOLDER.glob("*.py"):
        if path.name != "cache.py":
            assert "njit" not in path.read_text() and "numba.jit" not in path.read_text(), path.name
