"""Schedules with a real server: a kill of the program under each, and rollouts that go on over weight updates."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.sglang_servers.test_end_to_end_sglang import ROUNDED, SMALL

pytestmark = [pytest.mark.sglang, pytest.mark.night, pytest.mark.timeout(900)]
STEPS = 6


def killed_and_resumed(start: list[str], run: Path, steps: int) -> None:
    """The run, killed when it has logged `steps` steps, and resumed to its end."""
    process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= steps):
        assert process.poll() is None and time.monotonic() < deadline, f"no step {steps}"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished([sys.executable, "-m", "runner", f"resume={run}"])


def finished(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def samples_of(run: Path) -> list[dict[str, Any]]:
    files = sorted(run.glob("rollouts/step_*.jsonl"), key=lambda path: int(path.stem.rpartition("_")[2]))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("schedule", ["sync", "one_step_off"])
def test_a_killed_and_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path, schedule: str) -> None:
    """One request at a time, so that all share their batches: with several a server puts together those that are there."""
    small = [*SMALL, "precision=int4_qat", "steps=5", f"algorithm.schedule={schedule}", "rollout.max_concurrency=1"]
    small += ["algorithm.prompts_per_step=2", "algorithm.samples_per_prompt=4", "rollout.sampling.max_response_tokens=12"]
    small += ["evaluation.interval_steps=0", "checkpoint.interval_steps=2", "checkpoint.keep=5", "speculative=none"]
    start = [sys.executable, "-m", "runner", *small, f"outputs_dir={tmp_path}"]
    finished([*start, "run_name=whole"])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed_and_resumed([*start, "run_name=killed"], killed, 3)  # step 3 is lost, and made again
    waits = [(killed / "checkpoints" / f"step_{step:06d}" / "rollout").is_dir() for step in (2, 4)]
    assert waits == [schedule == "one_step_off"] * 2
    assert samples_of(killed) == samples_of(whole) and len(samples_of(whole)) >= 5
    assert len(rows_of(killed)) == len(rows_of(whole)) == 5
    for one, other in zip(rows_of(whole), rows_of(killed), strict=True):
        # which tensors a sync checks, and what was resident before the first, depends on the engine's own loads
        keys = [key for key in one if not key.startswith(("perf/", "_", "sync/"))]
        rounded = [key for key in keys if key.startswith(ROUNDED)]
        exact = [key for key in keys if key not in rounded]
        assert len(exact) > 20 and {key: one[key] for key in exact} == {key: other[key] for key in exact}
        assert {key: one[key] for key in rounded} == pytest.approx({key: other[key] for key in rounded}, rel=1e-3, abs=1e-5)


def test_samples_go_on_over_updates_and_a_kill_loses_and_doubles_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    # two at a time: a rollout takes longer than a step of the trainer, so requests are on their way when weights come
    options = [f"steps={STEPS}", "algorithm.schedule=async", "rollout.max_concurrency=2"]
    options += ["evaluation.interval_steps=0", "mismatch.decompose_interval_steps=2"]
    start = [sys.executable, "-m", "runner", *SMALL, f"outputs_dir={tmp_path}", "run_name=run", "precision=int4_qat", *options]
    killed_and_resumed(start, run, 3)
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert max(row["train/weight_version_lag"] for row in rows) <= 1  # algorithm.max_staleness
    lags = {key.rpartition("_")[2] for row in rows for key in row if "/lag_" in key}
    assert lags == {"0", "1"}
    assert sum(row["rollout/requests_continued"] for row in rows) > 0
    decomposed = [row for row in rows if "mismatch/staleness" in row]
    assert len(decomposed) == STEPS // 2 and all(row["mismatch/residual"] < 1e-9 for row in decomposed)
    prompts = Counter(sample["prompt_id"] for sample in samples_of(run))
    assert len(prompts) == 8 * STEPS and set(prompts.values()) == {1}  # one sample of each prompt is kept, none comes twice
