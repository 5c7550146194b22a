"""What `--version` and environment.json say of where the code comes from."""

from __future__ import annotations

import json
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from runner import __version__, provenance
from runner.__main__ import main

ROOT = Path(__file__).parent.parent
COMMIT = "6472d9e0" * 5


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    (tmp_path / "runner").mkdir()
    (tmp_path / "runner" / "a.py").write_text("a = 1\n")
    person = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for words in (["init", "-q"], ["add", "-A"], [*person, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    return tmp_path


def test_a_checkout_says_its_commit_and_whether_files_differ(repository: Path) -> None:
    found = provenance.commit(repository / "runner")
    assert found is not None and len(found["commit"]) == 40 and found["dirty"] is False
    (repository / "runner" / "a.py").write_text("a = 2\n")
    assert provenance.commit(repository / "runner") == found | {"dirty": True}


def test_a_repository_around_an_installed_package_is_not_its_own(repository: Path) -> None:
    inside = repository / "venv" / "site-packages" / "runner"
    inside.mkdir(parents=True)
    assert provenance.commit(inside) is None
    (inside / provenance.RECORD).write_text(json.dumps({"commit": COMMIT, "dirty": False}))
    assert provenance.commit(inside) == {"commit": COMMIT, "dirty": False}


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (None, "unknown"),
        ({"commit": COMMIT, "dirty": False}, COMMIT),
        ({"commit": COMMIT, "dirty": True}, f"{COMMIT}, with changes"),
    ],
)
def test_the_line(
    found: dict[str, object] | None, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(provenance, "commit", lambda: found)
    assert main(["--version"]) == 0 == main(["plan", "--version"])
    assert capsys.readouterr().out.splitlines() == [f"runner {__version__}, commit {told}"] * 2


def test_the_files_about_the_package_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert __version__ == project["version"] == citation["version"]
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
