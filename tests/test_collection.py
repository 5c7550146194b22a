"""The suite can be collected where `make setup` ran and `make setup-sglang` did not, as CI does it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HIDES = """
import importlib.abc
import sys


class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("aiohttp", "sglang", "sglang_router"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hidden())
"""


@pytest.mark.slow  # collects two suites
def test_tests_that_need_sglang_are_skipped_and_not_errors_where_it_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "hides_sglang.py").write_text(HIDES)
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--co", "-p", "hides_sglang", tests / "sglang_servers", tests / "ray_nodes"],
        cwd=tests.parent,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "test_server_weights.py" in done.stdout
