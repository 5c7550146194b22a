"""Asynchronous rollouts with a real server: over weight updates, and over a kill of the program."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.sglang_servers.test_end_to_end_sglang import SMALL

pytestmark = [pytest.mark.sglang, pytest.mark.night, pytest.mark.timeout(900)]
STEPS = 6


def test_samples_go_on_over_updates_and_a_kill_loses_and_doubles_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    # two at a time: a rollout takes longer than a step of the trainer, so requests are on their way when weights come
    options = [f"steps={STEPS}", "algorithm.schedule=async", "rollout.max_concurrency=2"]
    options += ["evaluation.interval_steps=0", "mismatch.decompose_interval_steps=2"]
    start = [sys.executable, "-m", "runner", *SMALL, f"outputs_dir={tmp_path}", "run_name=run", "precision=int4_qat", *options]
    process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline, "no third step"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run([sys.executable, "-m", "runner", f"resume={run}"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert max(row["train/weight_version_lag"] for row in rows) <= 1  # algorithm.max_staleness
    lags = {key.rpartition("_")[2] for row in rows for key in row if "/lag_" in key}
    assert lags == {"0", "1"}
    assert sum(row["rollout/requests_continued"] for row in rows) > 0
    decomposed = [row for row in rows if "mismatch/staleness" in row]
    assert len(decomposed) == STEPS // 2 and all(row["mismatch/residual"] < 1e-9 for row in decomposed)
    prompts = Counter(
        json.loads(line)["prompt_id"]
        for step in sorted(run.glob("rollouts/step_*.jsonl"))
        for line in step.read_text().splitlines()
    )
    assert len(prompts) == 8 * STEPS and set(prompts.values()) == {1}  # one sample of each prompt is kept, none comes twice
