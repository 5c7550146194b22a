"""Sweeps: expansion, folders, order, failures, skipping, Ctrl-C. The jobs' processes are small scripts here."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner import lock
from runner.config import schema
from runner.errors import UserError, UserErrors
from runner.sweep import jobs as sweep_jobs
from runner.sweep import summary, supervise
from runner.tracking import folder
from runner.tracking.tracker import JsonlTracker
from tests.configs import composed

# argv: folder, reward, mode. A job that leaves what a real run leaves.
JOB = """
import sys, time, signal
from pathlib import Path
from runner.tracking.tracker import CompositeTracker, JsonlTracker, StatusTracker
run, reward, mode = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
tracker = CompositeTracker([JsonlTracker(run), StatusTracker(run)])
print("job says", reward, flush=True)
try:
    for step in range(3):
        tracker.log(step, {"rollout/raw_reward": reward, "eval/x": reward + .01, "train/train_rollout_logprob_abs_diff": .007})
        (run / "count").open("a").write("x")
        if mode == "slow":
            (run.parent / "ready").touch()
            time.sleep(60)
except KeyboardInterrupt:
    tracker.finish("interrupted", {}, "interrupted; checkpoint is complete")
    sys.exit(130)
if mode == "fail":
    tracker.finish("failed", {}, "out of memory\\nmore")
    sys.exit(1)
tracker.finish("completed", {}, "completed")
"""


def fake_load(outputs: Path):
    def load(overrides: list[str]) -> schema.Config:
        cfg = composed()
        cfg.outputs_dir = str(outputs)
        values = dict(item.split("=", 1) for item in overrides)
        cfg.seed = int(values.get("seed", 1))
        if not values.get("precision.group_size", "32").isdigit():
            raise UserErrors([UserError("not a number", key="precision.group_size"), UserError("the same everywhere")])
        return cfg

    return load


def fake_command(modes: dict[str, str]):
    def command(job: sweep_jobs.Job) -> list[str]:
        size = int(job.point["precision.group_size"])
        return [sys.executable, "-c", JOB, str(job.folder), str(size / 1000), modes.get(job.name, "ok")]

    return command


def jobs_of(tmp_path: Path, *overrides: str) -> tuple[Path, list[sweep_jobs.Job]]:
    return sweep_jobs.plan(list(overrides), fake_load(tmp_path))


# ---- expansion


def test_expand_is_the_product_with_the_last_key_fastest() -> None:
    jobs = sweep_jobs.expand(["seed=1,2", "steps=4", "precision=choice(bf16,int4_qat)", "x=range(0,2)"])
    assert [list(point.values()) for point, _ in jobs] == [
        [seed, precision, x] for seed in "12" for precision in ("bf16", "int4_qat") for x in "01"
    ]
    assert jobs[-1][1] == ["steps=4", "seed=2", "precision=int4_qat", "x=1"]


def test_expand_keeps_lists_and_quotes_whole() -> None:
    assert [point["a"] for point, _ in sweep_jobs.expand(["a=[1,2],[3]"])] == ["[1,2]", "[3]"]
    assert [point["a"] for point, _ in sweep_jobs.expand(["a='x,y',z"])] == ["'x,y'", "z"]
    assert sweep_jobs.expand(["a=[1,2]"]) == [({}, ["a=[1,2]"])]


def test_a_value_named_twice_is_one_run_and_a_key_swept_twice_takes_all_values() -> None:
    assert [point for point, _ in sweep_jobs.expand(["seed=1,1"])] == [{"seed": "1"}]
    assert [point["seed"] for point, _ in sweep_jobs.expand(["seed=1,2", "steps=3", "seed=2,4"])] == ["1", "2", "4"]
    assert len(sweep_jobs.expand(["trainer.optimizer.lr=1e-4,0.0001,1.0e-4"])) == 1
    assert [point["x"] for point, _ in sweep_jobs.expand(["x=true,1,'a',a"])] == ["True", "1", "'a'"]
    assert [point["run_name"] for point, _ in sweep_jobs.expand(["run_name=1e5,100000.0"])] == ["'1e5'", "'100000.0'"]
    assert [point["seed"] for point, _ in sweep_jobs.expand(["seed=1,01,+1,007,7"])] == ["1", "007"]
    assert [point["run_name"] for point, _ in sweep_jobs.expand(["run_name=1,01,001"])] == ["'1'", "01", "001"]
    assert sweep_jobs.merged(["seed=1,2", "x=3,4"]) == []
    assert "seed names a value more than once" in sweep_jobs.merged(["seed=1,1"])[0]
    assert "seed is swept 2 times; its values together: 1, 2, 3" in sweep_jobs.merged(["seed=1,2", "seed=3,1"])[0]
    with pytest.raises(UserError, match="seed: is swept, and set to one value"):
        sweep_jobs.expand(["seed=1,2", "seed=3"])


@pytest.mark.parametrize("bad", ["a=glob(*)", "a=interval(0,1)", "a=range(1,4),8", "a=1,glob(*)", "a b", "a=[1"])
def test_overrides_that_cannot_be_listed_are_refused(bad: str) -> None:
    with pytest.raises(UserError):
        sweep_jobs.expand([bad])


def test_folders_are_deterministic_distinct_and_safe(tmp_path: Path) -> None:
    first, jobs = jobs_of(tmp_path, "precision.group_size=32,64", "seed=1,2")
    assert [job.name for job in jobs][:2] == ["precision.group_size=32,seed=1", "precision.group_size=32,seed=2"]
    again, _ = jobs_of(tmp_path, "seed=1,2", "precision.group_size=32,64")
    assert jobs_of(tmp_path, "precision.group_size=32,64", "seed=1,2")[0] == first and again != first
    assert jobs_of(tmp_path, "precision.group_size=32,128")[0] != first
    names = {sweep_jobs.job_name({"a": value}) for value in ("x/y", "x_y", "x:y", "z" * 300, "z" * 301)}
    assert len(names) == 5 and not any("/" in name or len(name) > 140 for name in names)


def test_a_changed_default_is_another_sweep(tmp_path: Path) -> None:
    def other(overrides: list[str]) -> schema.Config:
        cfg = fake_load(tmp_path)(overrides)
        cfg.steps = 7
        return cfg

    assert sweep_jobs.plan(["seed=1,2"], other)[0] != sweep_jobs.plan(["seed=1,2"], fake_load(tmp_path))[0]


def test_every_problem_of_every_job_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserErrors) as caught:
        jobs_of(tmp_path, "precision.group_size=32,a,b")
    assert len(caught.value.errors) == 2 and not list(tmp_path.iterdir())  # each problem once


def test_real_command_starts_or_resumes(tmp_path: Path) -> None:
    _, (job, _) = jobs_of(tmp_path, "precision.group_size=32,64")
    command = sweep_jobs.run_command(job)
    assert command[1:4] == ["-m", "runner", "run"] and "precision.group_size=32" in command
    parser = sweep_jobs.OverridesParser.create()
    values = {text.split("=")[0]: parser.parse_override(text).value() for text in command[5:]}
    assert values == {"run_name": f"{job.folder.parent.name}/{job.name}", "tracking.group": job.folder.parent.name}
    _, (grouped, _) = jobs_of(tmp_path, "precision.group_size=32,64", "tracking.group=mine")
    assert not any(text.startswith("tracking.group=s") for text in sweep_jobs.run_command(grouped))
    checkpoint = job.folder / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    assert sweep_jobs.run_command(job)[4:] == [f"resume='{job.folder}'"]


# ---- running


def test_goes_on_after_a_failure_and_skips_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, jobs = jobs_of(tmp_path, "precision.group_size=32,64,128")
    failing = {"precision.group_size=64": "fail"}
    assert supervise.Sweep(root, jobs, fake_command(failing)).run() == 1
    shown = capsys.readouterr()
    assert "failed (exit code 1): out of memory" in shown.out and "1 of 3 jobs did not complete" in shown.err
    rows = list(csv.DictReader((root / "summary.csv").open()))
    assert [(row["precision.group_size"], row["state"], row["reward"]) for row in rows] == [
        ("32", "completed", "0.032"),
        ("64", "failed", "0.064"),
        ("128", "completed", "0.128"),
    ]
    assert [row["best eval"] for row in rows] == ["0.042", "0.074", "0.138"] and rows[0]["mismatch"] == "0.007"
    assert "| 128 " in (root / "summary.md").read_text() and "| 128 " in shown.out
    assert "group_size=128" in (root / "comparison.html").read_text()
    assert "job says 0.064" in (jobs[1].folder / "logs" / "sweep.log").read_text()

    assert supervise.Sweep(root, jobs, fake_command({})).run() == 0
    shown = capsys.readouterr()
    assert shown.out.count("already completed, skipped") == 2
    assert [len((job.folder / "count").read_text()) for job in jobs] == [3, 6, 3]
    assert [row["state"] for row in csv.DictReader((root / "summary.csv").open())] == ["completed"] * 3


def test_seeds_are_averaged_over_completed_jobs(tmp_path: Path) -> None:
    root, jobs = jobs_of(tmp_path, "precision.group_size=32,64", "seed=1,2,3")
    for job, reward in zip(jobs, (0.1, 0.2, 0.3, 0.5, 0.7, 0.9), strict=True):
        JsonlTracker(job.folder).log(0, {"rollout/raw_reward": reward})
        folder.write_status(job.folder, "failed" if reward == 0.9 else "completed", step=1)
    columns, rows = summary.seed_rows(jobs)
    assert columns[:3] == ["precision.group_size", "seeds", "reward"]
    assert [row[:3] for row in rows] == [["32", "3", "0.2 ± 0.1"], ["64", "2", "0.6 ± 0.14"]]
    summary.write_summary(root, jobs)
    assert "0.6 ± 0.14" in (root / "summary.md").read_text()


def test_a_job_that_dies_before_its_first_word_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, jobs = jobs_of(tmp_path, "precision.group_size=32")
    assert supervise.Sweep(root, jobs, lambda job: [sys.executable, "-c", "import nothing_of_the_kind"]).run() == 1
    shown = capsys.readouterr().out
    assert "failed (exit code 1): ModuleNotFoundError" in shown and "comparison:" not in shown
    assert "| failed" in (root / "summary.md").read_text()


def test_stopped_jobs_are_left_and_running_ones_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, jobs = jobs_of(tmp_path, "precision.group_size=32,64")
    folder.write_status(jobs[0].folder, "stopped", step=2)
    assert supervise.Sweep(root, jobs, fake_command({})).run() == 1  # a stopped job is no completed one
    assert f"resume={jobs[0].folder} continues it" in capsys.readouterr().out
    assert [job.state for job in jobs] == ["stopped", "completed"]
    folder.write_status(jobs[0].folder, "running", step=2)  # by this process
    with pytest.raises(UserError, match="is being run"):
        supervise.Sweep(root, jobs, fake_command({})).run()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_lets_the_job_save_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    driver = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "import test_sweep as t; from runner.sweep.supervise import Sweep;"
        "root, jobs = t.jobs_of(Path(sys.argv[2]), 'precision.group_size=32,64,128');"
        "sys.exit(Sweep(root, jobs, t.fake_command({'precision.group_size=64': 'slow'})).run())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", driver, str(Path(__file__).parent), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    root, jobs = jobs_of(tmp_path, "precision.group_size=32,64,128")
    deadline = time.monotonic() + 60
    while not (root / "ready").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert [job.state for job in jobs] == ["completed", "interrupted", "not started"]
    assert "2 jobs are left. The same command continues" in err and "Traceback" not in err + out
    status = folder.read_status(jobs[1].folder)
    assert status is not None and not sweep_child_alive(status["pid"])
    assert supervise.Sweep(root, jobs, fake_command({})).run() == 0


def sweep_child_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


HOLDER = """
import sys, time
from pathlib import Path
from runner.lock import Lock
from runner.tracking.folder import write_status
run = Path(sys.argv[1])
lock = Lock(run)
write_status(run, "running", step=1)
print("locked", flush=True)
sys.stdin.readline()
write_status(run, sys.argv[2], step=3)
"""


@pytest.mark.parametrize("ends", ["completed", "failed"])
def test_a_job_that_another_process_runs_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """A sweep that was killed leaves its running job: the same command must not run it a second time."""
    root, jobs = jobs_of(tmp_path, "precision.group_size=32,64")
    JsonlTracker(jobs[0].folder).log(0, {"rollout/raw_reward": 0.5})
    command = [sys.executable, "-c", HOLDER, str(jobs[0].folder), ends]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == "locked\n"
    waits: list[float] = []

    def wait(seconds: float) -> None:
        assert jobs[0].state == "running" and not (jobs[0].folder / "count").exists()
        waits.append(seconds)
        if len(waits) == 3:
            assert other.stdin is not None
            other.stdin.close()
            other.wait()

    monkeypatch.setattr(supervise.time, "sleep", wait)
    assert supervise.Sweep(root, jobs, fake_command({})).run() == 0
    shown = capsys.readouterr().out
    assert f"waiting for process {other.pid} on host" in shown and len(waits) == 3
    assert ("already completed, skipped" in shown) == (ends == "completed")
    assert (jobs[0].folder / "count").exists() == (ends == "failed")  # it is run once the other one has failed


def test_a_job_that_somebody_takes_first_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the lock and the start of the job's process, which is then refused with exit code 2."""
    root, jobs = jobs_of(tmp_path, "precision.group_size=32")
    job = jobs[0].folder
    script = f"""
import subprocess, sys
other = subprocess.Popen([sys.executable, "-c", {HOLDER!r}, {str(job)!r}, "completed"], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True, start_new_session=True)
other.stdout.readline()
import os
open({str(job / "pid")!r}, "w").write(str(other.pid))
os._exit(2)
"""
    waits: list[float] = []
    monkeypatch.setattr(supervise.time, "sleep", waits.append)  # the other one ends with its stdin, which its starter held
    starts: list[str] = []

    def command(started: sweep_jobs.Job) -> list[str]:
        starts.append(started.name)
        return [sys.executable, "-c", script]

    assert supervise.Sweep(root, jobs, command).run() == 0
    assert starts == [jobs[0].name] and jobs[0].state == "completed"


def test_two_processes_do_not_run_one_sweep(tmp_path: Path) -> None:
    root, jobs = jobs_of(tmp_path, "precision.group_size=32,64")
    root.mkdir()
    held = lock.Lock(root)
    with pytest.raises(UserError, match=f"this sweep is being run by process {os.getpid()}"):
        supervise.Sweep(root, jobs, fake_command({})).run()
    held.release()
    assert supervise.Sweep(root, jobs, fake_command({})).run() == 0


def test_a_damaged_job_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, jobs = jobs_of(tmp_path, "precision.group_size=32,64")
    assert supervise.Sweep(root, jobs, fake_command({})).run() == 0
    (jobs[0].folder / "metrics.jsonl").write_bytes(b"\xff\n")
    (jobs[1].folder / "status.json").write_bytes(b"")
    capsys.readouterr()
    assert supervise.Sweep(root, jobs, fake_command({})).run() == 0
    assert f"{jobs[0].name} is left out of the summary" in capsys.readouterr().err
    assert [row["reward"] for row in csv.DictReader((root / "summary.csv").open())] == ["", "0.064"]
    assert len((jobs[1].folder / "count").read_text()) == 6  # nobody knew how it had ended


def test_a_folder_in_the_way_of_a_job_stays_as_it_is(tmp_path: Path) -> None:
    root, jobs = jobs_of(tmp_path, "precision.group_size=32,64")
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / "metrics.jsonl").write_text("somebody's")
    with pytest.raises(UserError, match="not the folder of a run"):
        supervise.Sweep(root, jobs, fake_command({})).run()
    assert (jobs[0].folder / "metrics.jsonl").read_text() == "somebody's"
