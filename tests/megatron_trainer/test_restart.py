"""A rank killed in the middle of a step: the run goes back to its last checkpoint, and its metrics do not show it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.run.supervise import RESTART, _restart_point
from runner.tracking.tracker import JsonlTracker
from runner.trainer.megatron.ranks import RankFailure
from runner.trainer.protocol import TrainerLost
from tests.megatron_trainer.configs import megatron_config

STEPS, INTERVAL = 4, 2
# Trainer steps in whose middle rank 1 is killed, counted over restarts. 0: before there is a checkpoint, so that the run begins
# again; 1, 2, 3 are then steps 0, 1, 2. 4: step 3, after the checkpoint of 2 steps, so that step 2 is done again too.
KILLS = "0,4"
BOUND_SECONDS = 120  # from the kill to the end of the run; a start of two ranks takes most of it
# The program, with rank 1 killed 20 ms into the trainer's steps of these numbers.
PROGRAM = """
import os, signal, sys, threading
from runner.trainer.megatron import MegatronTrainer
step, kills, done = MegatronTrainer.step, sys.argv.pop(1).split(","), []
def killed(self, batch):
    if str(len(done)) in kills:
        threading.Timer(0.02, os.kill, (self.ranks.pids[1], signal.SIGKILL)).start()
    done.append(None)
    return step(self, batch)
MegatronTrainer.step = killed
from runner.__main__ import main
sys.exit(main())
"""


def _run(outputs: Path, name: str, kills: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-c", PROGRAM, kills, "trainer=megatron", "parallelism=cpu2", "tracking=none",
        f"outputs_dir={outputs}", f"run_name={name}", f"steps={STEPS}", f"checkpoint.interval_steps={INTERVAL}",
        "algorithm.prompts_per_step=4", "algorithm.samples_per_prompt=4", "evaluation.interval_steps=2",
        "evaluation.num_prompts=4", "warm_start.max_steps=10", "warm_start.check_interval_steps=10",
        "warm_start.stop_at_reward=0.0", "speculative.auto_disable=false", *overrides,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


def _metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def _restarts(run: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == RESTART]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_survives_a_killed_rank_and_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    done = _run(tmp_path, "whole", kills="none")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    done = _run(tmp_path, "killed", KILLS, "trainer.max_restarts=2")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    first, second = _restarts(tmp_path / "killed")
    assert first["data"] == {"restarts": 1, "from": None} and first["step"] == 0
    assert second["data"] == {"restarts": 2, "from": f"step_{INTERVAL:06d}"} and second["step"] == 3
    assert "rank 1 was killed by signal 9 during updates" in str(second["message"])
    status = json.loads((tmp_path / "killed" / "status.json").read_text())
    assert status["state"] == "completed" and status["updated"] - float(str(second["time"])) < BOUND_SECONDS
    whole, killed = _metrics(tmp_path / "whole"), _metrics(tmp_path / "killed")
    assert [row["step"] for row in killed] == list(range(STEPS))
    assert killed == whole
    assert not _restarts(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_restarts_the_run_ends_with_a_message(tmp_path: Path) -> None:
    done = _run(tmp_path, "ended", "0", "trainer.max_restarts=0", "warm_start.enabled=false")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "trainer rank 1 was killed by signal 9 during updates" in done.stdout
    assert json.loads((tmp_path / "ended" / "status.json").read_text())["state"] == "failed"
    assert not _restarts(tmp_path / "ended")


def test_restarts_have_an_end(tmp_path: Path) -> None:
    cfg = megatron_config(**{"trainer.max_restarts": 1})
    tracker = JsonlTracker(tmp_path)
    assert _restart_point(cfg, tmp_path, RankFailure("rank 1 is gone"), 1, tracker) is None  # type: ignore[arg-type]
    with pytest.raises(TrainerLost, match=r"after 1 of 1 restarts \(trainer.max_restarts\): rank 1 is gone"):
        _restart_point(cfg, tmp_path, RankFailure("rank 1 is gone"), 2, tracker)  # type: ignore[arg-type]
