"""docs/extending.md works: its files are written into a copy of the tree, and its tests and commands run there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import extending

SECTIONS = extending.sections()
WHOLE_RUNS = SECTIONS["All of them in a run"].commands
QUICK = [line for section in SECTIONS.values() for line in section.commands if line not in WHOLE_RUNS]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    extending.write(folder)
    return folder


def started(tree: Path, command: str, timeout: int = 240) -> str:
    """What a command line of the page prints, run in the copy of the tree."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    environment = {key: value for key, value in os.environ.items() if key != "RUNNER_CONFIG_DIR"} | {"PYTHONPATH": str(tree)}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_table_counts_the_files_of_each_example() -> None:
    rows = re.findall(r"^\| \[(.+?)\]\(#(.+?)\) \| (\d+) \|", extending.PAGE.read_text(), flags=re.MULTILINE)
    told = {anchor: int(count) for _, anchor, count in rows}
    found = {title.lower().replace(" ", "-"): len(section.touched) for title, section in SECTIONS.items() if section.files}
    assert told == found and len(found) >= 9


def test_examples_pass_their_own_tests(tree: Path) -> None:
    tests = [path for section in SECTIONS.values() for path in section.files if path.startswith("tests/")]
    printed = started(tree, f"python -m pytest -p no:cacheprovider {' '.join(tests)}")
    assert re.search(r"\d+ passed", printed) and len(tests) >= 7, printed


def test_examples_are_written_as_the_rest_is(tree: Path) -> None:
    paths = [path for section in SECTIONS.values() for path in [*section.files, *section.edits] if path.endswith(".py")]
    for command in ("check --no-cache", "format --no-cache --check"):
        started(tree, f"python -m ruff {command} {' '.join(paths)}")


@pytest.mark.parametrize("command", QUICK)
def test_commands_end_well(tree: Path, command: str) -> None:
    assert started(tree, command)


@pytest.mark.slow
@pytest.mark.parametrize("command", WHOLE_RUNS)
def test_examples_run(tree: Path, command: str) -> None:
    assert "completed" in started(tree, command)
