"""The real program as a user starts it: a process, a folder, a kill, a resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.tracking.base import POOL_DECISION

pytestmark = pytest.mark.slow

SMALL = [
    "steps=6",
    "warm_start.max_steps=40",
    "warm_start.check_interval_steps=40",
    "checkpoint.interval_steps=2",
    "algorithm.prompts_per_step=4",
    "algorithm.samples_per_prompt=4",
    "evaluation.interval_steps=3",
    "evaluation.num_prompts=8",
    "tracking=none",
    "speculative.auto_disable=false",  # a decision made by timing would differ between two runs
]


def _command(outputs: Path, name: str, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "runner", *SMALL, f"outputs_dir={outputs}", f"run_name={name}", *overrides]


def _run(command: list[str], expect: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == expect, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def _metrics(run: Path) -> list[dict[str, float]]:
    """Per-step metrics without what measures time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def _wait_for_steps(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    path = run / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (path.is_file() and len(path.read_text().splitlines()) >= count):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


# The program with its rollouts in a thread beside the trainer, as engines of their own processes have them.
BESIDE = """
import sys
from runner.run import schedules
schedules.one_process = lambda cfg: False
from runner.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("option", ["precision=int4_qat", "precision=bf16 algorithm.schedule=one_step_off", "model=tiny_vlm"])
def test_a_killed_and_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path, option: str) -> None:
    """One step off policy, the whole run overlaps and the killed one does not: the order of work changes no number either."""
    options = option.split()
    whole_run = _command(tmp_path, "whole", *options)
    _run([sys.executable, "-c", BESIDE, *whole_run[3:]] if len(options) > 1 else whole_run)
    process = subprocess.Popen(
        _command(tmp_path, "killed", *options, "steps=6"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    _wait_for_steps(tmp_path / "killed", 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / "killed" / "status.json").read_text())["state"] == "running"
    _run([sys.executable, "-m", "runner", f"resume={tmp_path / 'killed'}"])
    whole, resumed = _metrics(tmp_path / "whole"), _metrics(tmp_path / "killed")
    assert [row["step"] for row in resumed] == list(range(6))
    assert resumed == whole


# The program with a made-up clock: an engine step that proposes takes argv[1] times the seconds per token of one that does not.
CLOCKED = """
import sys
from runner.rollout.local.speculation import Speculation
record, factor = Speculation.record, float(sys.argv.pop(1))
def made_up(self, proposal, kept, tokens, seconds):
    record(self, proposal, kept, tokens, tokens * (1.0 if self._plain_turn else factor))
Speculation.record = made_up
from runner.__main__ import main
sys.exit(main())
"""
INTERVAL = 3  # steps between checkpoints
DECIDE_AFTER = 45  # engine steps of each kind: reached in the step after the first checkpoint


def _clocked(factor: float, *arguments: str) -> list[str]:
    return [sys.executable, "-c", CLOCKED, str(factor), *arguments]


def _decisions(run: Path) -> list[tuple[int, bool]]:
    """(step, disabled) of every complete line of events.jsonl that records one."""
    path = run / "events.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    return [(row["data"]["step"], row["data"]["decision"]["disabled"]) for row in rows if row["kind"] == POOL_DECISION]


def test_a_kill_after_a_decision_and_before_a_checkpoint_repeats_the_decision(tmp_path: Path) -> None:
    """The clock of the resumed process says that proposing is the faster way; the killed one had recorded the opposite."""
    overrides = [f"checkpoint.interval_steps={INTERVAL}", "evaluation.interval_steps=0", "speculative.auto_disable=true"]
    overrides += [f"speculative.auto_disable_after_steps={DECIDE_AFTER}"]
    whole, killed = (_command(tmp_path, name, *overrides)[3:] for name in ("whole", "killed"))
    _run(_clocked(2.0, *whole))
    process = subprocess.Popen(_clocked(2.0, *killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not _decisions(tmp_path / "killed"):
        assert process.poll() is None and time.monotonic() < deadline, "no decision was recorded"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ((step, disabled),) = _decisions(tmp_path / "killed")
    saved = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert disabled and INTERVAL <= step < 2 * INTERVAL - 1
    assert saved == [f"step_{INTERVAL:06d}"]  # the decision stands in events.jsonl alone
    _run(_clocked(0.5, f"resume={tmp_path / 'killed'}"))
    assert set(_decisions(tmp_path / "killed")) == {(step, True)} == set(_decisions(tmp_path / "whole"))
    resumed = _metrics(tmp_path / "killed")
    assert resumed == _metrics(tmp_path / "whole")
    assert [row["rollout/spec_enabled"] for row in resumed] == [float(i <= step) for i in range(6)]


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_resume(tmp_path: Path) -> None:
    process = subprocess.Popen(
        _command(tmp_path, "stopped", "steps=1000"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    _wait_for_steps(tmp_path / "stopped", 1, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert f"resume={tmp_path / 'stopped'}" in output
    done = json.loads((tmp_path / "stopped" / "status.json").read_text())
    assert done["state"] == "interrupted"
    _run([sys.executable, "-m", "runner", f"resume={tmp_path / 'stopped'}", f"steps={done['step'] + 1}"])
    assert [row["step"] for row in _metrics(tmp_path / "stopped")] == list(range(done["step"] + 1))


def test_the_folder_of_a_run_is_complete(tmp_path: Path) -> None:
    _run(_command(tmp_path, "run", "steps=2", "tracking=wandb"))
    run = tmp_path / "run"
    for name in ("resolved.yaml", "environment.json", "status.json", "metrics.jsonl", "report.html", ".hydra/overrides.yaml"):
        assert (run / name).stat().st_size > 0, name
    assert json.loads((run / "status.json").read_text())["state"] == "completed"
    row = _metrics(run)[-1]
    for key in ("rollout/raw_reward", "train/grad_norm", "train/train_rollout_logprob_abs_diff", "sync/changed_integers"):
        assert key in row, key


def test_unknown_resume_target_and_taken_name_are_one_message_each(tmp_path: Path) -> None:
    _run(_command(tmp_path, "first", "steps=1"))
    again = _run(_command(tmp_path, "first", "steps=1"), expect=2)
    assert "already holds a run" in again.stderr and "Traceback" not in again.stderr
    lost = _run([sys.executable, "-m", "runner", "resume=frist", f"outputs_dir={tmp_path}"], expect=2)
    assert "resume=first" in lost.stderr and "Traceback" not in lost.stderr


def test_a_read_only_outputs_folder_is_one_message(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")  # a permission bit would not stop root
    result = _run([sys.executable, "-m", "runner", f"outputs_dir={blocked}", "steps=1"], expect=2)
    assert "cannot write" in result.stderr and "Traceback" not in result.stderr
