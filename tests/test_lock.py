"""The locks that `make setup` and `make setup-gpu` install: within pyproject.toml's ranges, and what their inputs compile to."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LOCKS = {
    "constraints.txt": {"dev", "megatron", "docs", "tensorboard", "mlflow", "mcp"},
    "constraints-gpu.txt": {"dev", "megatron", "gpu", "tensorboard", "mlflow", "mcp"},
}


def pins(file: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    return {name: Version(version) for name, _, version in (line.partition("==") for line in lines)}


@pytest.mark.parametrize("file", LOCKS)
def test_the_pins_meet_what_pyproject_asks_for_and_name_no_index(file: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for extra in LOCKS[file] for text in project["optional-dependencies"][extra]]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        assert pins(file)[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_each_lock_has_its_own_torch_and_one_core_of_transformer_engine() -> None:
    cpu, gpu = pins("constraints.txt"), pins("constraints-gpu.txt")
    assert (str(cpu["torch"]), str(gpu["torch"])) == ("2.13.0", "2.14.1")
    assert "transformer-engine-cu13" in gpu and "transformer-engine-cu12" not in gpu
    assert not [name for name in cpu if name.startswith(("nvidia-", "cuda-"))]


def index_is_there() -> bool:
    """Whether a package index answers uv; it keeps no copy, so that an old answer does not count."""
    pytest.importorskip("uv", reason="make setup installs uv")
    command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--no-cache", "-"]
    try:
        done = subprocess.run(command, input="packaging", capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


@pytest.mark.slow  # asks a package index
def test_both_locks_are_what_their_inputs_compile_to() -> None:
    if not index_is_there():
        pytest.skip("no package index can be reached")
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "lock.py", "--check"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
