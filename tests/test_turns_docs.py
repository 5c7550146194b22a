"""docs/turns.md: what stands there is run as it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "turns.md").read_text()
FILES = {match[1]: match[2] for match in re.finditer(r"```python\n# (\S+\.py)\n(.*?)```", PAGE, re.DOTALL)}
COMMANDS = re.findall(r"^python -m runner (task\.rollout.*?(?:\\\n.*?)*)$", PAGE, re.MULTILINE)
SMALL = [
    "steps=1", "tracking=none", "algorithm.prompts_per_step=2", "algorithm.samples_per_prompt=16", "warm_start.max_steps=12",
    "warm_start.check_interval_steps=12", "evaluation.interval_steps=0", "mismatch.decompose_interval_steps=0",
]  # fmt: skip


def test_they_are_as_short_as_is_said() -> None:
    bodies = {name: [line for line in text.splitlines() if line.strip()] for name, text in FILES.items()}
    assert len(bodies["second_chance.py"]) <= 30 and len(bodies["two_looks.py"]) <= 20


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("command", "part"), list(zip(COMMANDS, ["environment", "first"], strict=True)))
def test_the_commands_of_the_page_train(tmp_path: Path, command: str, part: str) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    overrides = shlex.split(command.replace("\\\n", " "))
    line = [sys.executable, "-m", "runner", *overrides, *SMALL, f"outputs_dir={tmp_path}", "run_name=run"]
    result = subprocess.run(
        line, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["rollout/failed"] == 0 and f"reward/{part}" in row and row["rollout/turns/mean"] >= 1
