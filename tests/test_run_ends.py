"""How a run ends: refused, failed, without its folder; what exit code, files and advice then say. The real program, tiny."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.__main__ import main
from runner.errors import Failure
from runner.run import checkpoint
from runner.tracking.base import STEP_PARTS
from runner.trainer.torch.trainer import TorchTrainer
from tests.run_folders import unclocked

pytestmark = pytest.mark.slow

TINY = [
    "model=tiny_dense",
    "algorithm.prompts_per_step=2",
    "algorithm.samples_per_prompt=2",
    "warm_start.enabled=false",
    "evaluation.interval_steps=0",
    "mismatch.decompose_interval_steps=0",
    "mismatch.probe_sequences=0",
    "tracking=none",
    "trainer.threads=1",
    "rollout.sampling.max_response_tokens=4",
    "speculative.auto_disable=false",
    "checkpoint.interval_steps=1",
    "checkpoint.keep=9",
    "run_name=run",
]


def start(outputs: Path, *overrides: str) -> int:
    return main([*TINY, f"outputs_dir={outputs}", *overrides])


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def without_times(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows(run)]


def state(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """`act` at the beginning of the trainer's step `number`, counted from 0."""
    step, done = TorchTrainer.step, [0]

    def acting(self: TorchTrainer, batch: Any) -> dict[str, float]:
        done[0] += 1
        if done[0] == number + 1:
            act()
        return step(self, batch)

    monkeypatch.setattr(TorchTrainer, "step", acting)


def test_refused_resumes_leave_the_run_and_accepted_ones_become_part_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert start(tmp_path, "steps=2") == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for refused in ("model.hidden_size=96", "trainer.optimizer.lr=x", "task=gsm8k", "seed=-1", "trainer.master_weights=false"):
        assert main([f"resume={run}", refused, "steps=9"]) == 2, refused
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err + shown.out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    assert main([f"resume={run}", "steps=3"]) == 0
    assert main([f"resume={run}"]) == 0
    assert state(run)["step"] == 3 and len(rows(run)) == 3

    newest = checkpoint.complete(run)[-1]  # damage: the steps after the newest intact one are done again, with the same metrics
    whole = without_times(run)
    (newest / checkpoint.MANIFEST).write_bytes(b"")
    (run / "status.json").write_bytes(b"\xff")
    (run / "rollouts" / "step_x.jsonl").touch()
    assert main([f"resume={run}"]) == 0
    assert without_times(run) == whole and state(run)["step"] == 3
    told = [row["message"] for row in rows(run, "events.jsonl") if row["kind"] == "warning"]
    assert any("manifest.json is damaged" in text for text in told) and any("status.json" in text for text in told)


@pytest.mark.parametrize("schedule", ["sync", "one_step_off"])
def test_the_parts_of_a_step_are_the_step(tmp_path: Path, schedule: str) -> None:
    """With everything that a step may do; one step off, a rollout is generated beside the part before it and counts where it is
    waited for."""
    often = ["evaluation.interval_steps=1", "mismatch.decompose_interval_steps=1", "mismatch.probe_sequences=2"]
    assert start(tmp_path, "steps=4", *often, f"algorithm.schedule={schedule}") == 0
    steps = rows(tmp_path / "run")
    assert len(steps) == 4 and set(STEP_PARTS) <= set(steps[0])
    assert unclocked(steps) < 0.02
    for step in steps:
        assert 0 < step["perf/update_weights_export_time"] < step["perf/update_weights_time"]


def test_a_mistake_found_after_the_start_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n{"question": \n')
    data = [f"task.{name}_path={tmp_path / f'{name}.jsonl'}" for name in ("train", "eval")]
    assert start(tmp_path, "steps=1", "task=gsm8k", "task.max_prompt_tokens=128", *data) == 2
    shown = capsys.readouterr()
    assert "train.jsonl" in shown.err and "Traceback" not in shown.err + shown.out
    assert "no checkpoint to resume from" in shown.err and "resume=" not in shown.err + shown.out
    assert state(tmp_path / "run")["state"] == "failed"


@pytest.mark.parametrize("number", [0, 2])
def test_a_failure_is_exit_1_and_its_advice_fits_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def fail() -> None:
        raise Failure("something broke", fix="mend it")

    at_step(monkeypatch, number, fail)
    assert start(tmp_path, "steps=3") == 1
    shown = capsys.readouterr().out
    begin_again = "start the run again: there is no checkpoint to resume from"
    advice = f"python -m runner resume={tmp_path / 'run'} goes on from step_000002" if number else begin_again
    assert f"something broke\n     fix: mend it; then {advice}" in shown
    assert number or "resume=" not in shown


@pytest.mark.parametrize("gone", ["", "metrics.jsonl", "checkpoints", ".hydra"])
@pytest.mark.parametrize("number", [1, 2])
def test_outputs_that_were_deleted_are_no_completed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gone: str, number: int
) -> None:
    run = tmp_path / "run"
    target = run / gone
    at_step(monkeypatch, number, lambda: target.unlink() if target.is_file() else shutil.rmtree(target))
    assert start(tmp_path, "steps=3") == 1
    shown = capsys.readouterr()
    assert "deleted" in shown.out + shown.err and "completed" not in shown.out and "Traceback" not in shown.err
    assert run.exists() == bool(gone)  # nor is it made again


READ_ONLY = """
import subprocess, sys
outputs, number = sys.argv[1], int(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "none", outputs], check=True)
from runner.trainer.torch.trainer import TorchTrainer
step, done = TorchTrainer.step, []
def turns_read_only(self, batch):
    if len(done) == number:
        subprocess.run(["mount", "-o", "remount,ro", outputs], check=True)
    done.append(None)
    return step(self, batch)
TorchTrainer.step = turns_read_only
from runner.__main__ import main
sys.exit(main(sys.argv[3:]))
"""


def test_a_disk_that_turns_read_only_is_a_message(tmp_path: Path) -> None:
    command = [
        "unshare",
        "-Urm",
        sys.executable,
        "-c",
        READ_ONLY,
        str(tmp_path),
        "1",
        *TINY,
        f"outputs_dir={tmp_path}",
        "steps=3",
    ]
    done = subprocess.run([*command], capture_output=True, text=True, check=False)
    if "unshare:" in done.stderr or "permission" in done.stderr:
        pytest.skip("no mounts of one's own here")
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr
    assert "Read-only file system" in done.stdout + done.stderr and "goes on from step_000001" in done.stdout + done.stderr


def test_an_engine_that_computes_with_other_formats_than_planned_stops_the_run_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from runner.rollout.local.store import WeightStore

    monkeypatch.setattr(WeightStore, "formats", lambda store: dict.fromkeys(store.plan.tensors, "bf16"))
    assert start(tmp_path, "precision=int4_qat") == 2
    assert "run int4, engine bf16" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not rows(tmp_path / "run")
