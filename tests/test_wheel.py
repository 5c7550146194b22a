"""The wheel, unpacked where no checkout is near, has conf/ and recipes/ and composes and plans with them."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from runner import __version__, provenance
from runner.config.searchpath import HOME, groups

pytest.importorskip("hatchling", reason="`make setup` installs it")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel in it, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, HOME]
    subprocess.run(command, check=True, timeout=120)
    with zipfile.ZipFile(next(folder.glob("runner-*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def python(site: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "RUNNER_CONFIG_DIR"} | {"PYTHONPATH": str(site)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=site.parent, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_every_config_and_no_link(site: Path) -> None:
    for ours, theirs in ((HOME / "conf", site / "runner" / "conf"), (HOME / "recipes", site / "runner" / "recipes")):
        there = {str(file.relative_to(ours)): file.read_text() for file in ours.rglob("*.yaml")}
        assert there and there == {str(file.relative_to(theirs)): file.read_text() for file in theirs.rglob("*.yaml")}
        assert not [file for file in (ours, *ours.rglob("*")) if file.is_symlink()]


def test_it_names_its_version_and_commit(site: Path) -> None:
    ours = provenance.git_state(HOME)
    assert ours is not None or not (HOME / ".git").exists()
    line = f"runner {__version__}, commit " + (f"{ours['commit']}{', with changes' * ours['dirty']}" if ours else "unknown")
    assert python(site, "-m", "runner", "--version").strip() == line
    (license_file,) = site.glob("runner-*.dist-info/licenses/LICENSE")
    assert license_file.read_text() == (HOME / "LICENSE").read_text()


def test_it_composes_every_recipe_and_plans(site: Path) -> None:
    program = (
        "from runner.config import compose, searchpath\n"
        "for name in searchpath.groups()['recipe']:\n"
        "    assert compose.load([f'recipe={name}']).config.recipe == name\n"
        "    print(name)\n"
        "print(searchpath.HOME)\n"
    )
    *names, home = python(site, "-c", program).split()
    assert names == groups()["recipe"] and Path(home) == site / "runner"
    assert "FITS" in python(site, "-m", "runner", "plan", "recipe=moonlight_16b_int4")
