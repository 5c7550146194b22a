"""examples/: every project is run as its README has it, in few steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from runner.config import compose, searchpath
from runner.tracking.folder import read_metrics
from tests.docs_pages import ROOT, Command, blocks, run, small

HOME = ROOT / "examples"
PROJECTS = sorted(path.name for path in HOME.iterdir() if path.is_dir())


def commands(project: str) -> list[Command]:
    """The lines of the block below the project's title."""
    titles = re.findall(r"^## (\w+)$", (HOME / "README.md").read_text(), flags=re.MULTILINE)
    (block,) = [block for title, block in zip(titles, blocks(HOME / "README.md"), strict=True) if title == project]
    return block.commands


def played(project: str, folder: Path) -> list[str]:
    """What each of the project's commands prints, but for the server's, in a copy of the project."""
    shutil.copytree(HOME / project, folder, dirs_exist_ok=True)
    return [run(command, folder, 1) for command in commands(project) if "serve.py" not in command.words]


def test_there_are_five_of_a_page_each() -> None:
    assert len(PROJECTS) == 5 and all(commands(project) for project in PROJECTS)
    for file in HOME.rglob("*.py"):
        assert 20 <= len(file.read_text().splitlines()) <= 60, file


def test_options_of_ones_own_compose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(searchpath.VARIABLE, str(HOME / "own_task"))
    monkeypatch.syspath_prepend(str(HOME / "own_task"))
    cfg = compose.load_config(["task=shopping"])
    assert cfg.task.rewards["close"]._target_ == "shopping.close" and "{question}" in cfg.task.prompt_template


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_task_of_ones_own(tmp_path: Path) -> None:
    played("own_task", tmp_path)
    (row,) = read_metrics(tmp_path / "outputs" / "shop")
    assert row["reward/close"] >= 0 and row["reward/task"] >= 0
    assert "failed for" not in (tmp_path / "outputs" / "shop" / "events.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rollout_function_of_ones_own(tmp_path: Path) -> None:
    *_, shown = played("rollout_function", tmp_path)
    (row,) = read_metrics(tmp_path / "outputs" / "hinted")
    assert row["rollout/failed"] == 0 and row["reward/first"] >= 0 and "step 1" in shown


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_reward_service_of_ones_own(tmp_path: Path) -> None:
    played("reward_service", tmp_path)
    (row,) = read_metrics(tmp_path / "outputs" / "served")
    assert 0 < row["reward/short"] <= 0.2
    assert "failed for" not in (tmp_path / "outputs" / "served" / "events.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_is_exported_and_served(tmp_path: Path) -> None:
    *_, audited = played("convert_and_serve", tmp_path)
    assert "no differences" in audited
    (line,) = [command for command in commands("convert_and_serve") if "serve.py" in command.words]
    words = [*small(line, 1)[:-1], "0"]  # a port that is free
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            request = urllib.request.Request(address, json.dumps({"prompt": "12+34="}).encode(), method="POST")
            with urllib.request.urlopen(request, timeout=120) as reply:
                text = json.loads(reply.read())["text"]
        finally:
            server.terminate()
    said = "import serve, sys; from pathlib import Path; print(serve.answer(*serve.load(Path('sums-int4')), '12+34='), end='')"
    found = subprocess.run(
        [sys.executable, "-c", said], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert text and text == found.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_metrics_in_a_table(tmp_path: Path) -> None:
    *_, printed = played("read_metrics", tmp_path)
    rows = {line.split()[0]: line.split()[1] for line in printed.splitlines()[1:]}
    assert rows == {"bf16": "2", "int4_qat": "2"}
