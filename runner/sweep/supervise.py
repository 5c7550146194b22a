"""Run the jobs of a sweep one after the other, each in a fresh process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from runner import lock
from runner.config.overrides import shell, typed
from runner.errors import UserError
from runner.redaction import shown
from runner.storage import atomic_write
from runner.sweep.jobs import Job, run_command
from runner.sweep.summary import job_results, write_summary
from runner.tracking.folder import read_status
from runner.tracking.report import write_comparison

WAIT_SECONDS = 0.5  # between looks at a job that another process runs


class Sweep:
    """Runs the jobs one after the other. `command` makes a job's process; it is a parameter for the tests."""

    def __init__(self, folder: Path, jobs: list[Job], command: Callable[[Job], list[str]] = run_command) -> None:
        self.folder, self.jobs, self.command = folder, jobs, command

    def run(self) -> int:
        """0 when every job completed, 1 when one did not, 130 after Ctrl-C. The summary is written after every job.

        A job that another process runs (one that a killed sweep left, or somebody's `resume=`) is waited for. Raises UserError
        where another process runs this sweep already.
        """
        for job in self.jobs:
            if job.state == "running" and not lock.holder(job.folder):  # a run of before there were locks
                pid = (read_status(job.folder) or {})["pid"]
                raise UserError(f"{job.folder} is being run by process {pid}", fix="wait for it, or stop it with Ctrl-C")
        held = self._lock()
        # A batch system stops a job with SIGTERM: as with Ctrl-C, the running job saves first.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return self._run_all()
        finally:
            signal.signal(signal.SIGTERM, before)
            held.release()

    def _lock(self) -> lock.Lock:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return lock.Lock(self.folder)
        except lock.Held as held:
            raise UserError(
                f"this sweep is being run by {held.by}, in {self.folder}", fix="wait for it, or stop it with Ctrl-C"
            ) from None
        except OSError as error:
            raise _not_writable(self.folder, error) from error

    def _run_all(self) -> int:
        atomic_write(
            self.folder / "sweep.json",
            json.dumps([{"name": job.name, "overrides": shown(job.overrides)} for job in self.jobs], indent=2) + "\n",
        )
        print(f"sweep of {len(self.jobs)} jobs in {self.folder}", flush=True)
        interrupted = False
        for number, job in enumerate(self.jobs, 1):
            label = f"[{number}/{len(self.jobs)}] {job.name}"
            if interrupted := not self._wait_for_another(job, label):
                break
            if job.state in ("completed", "stopped"):
                by_rule = (
                    f" by a watch rule ({shell(typed('resume', str(job.folder)))} continues it)" if job.state == "stopped" else ""
                )
                print(f"{label}: already {job.state}{by_rule}, skipped", flush=True)
                continue
            print(f"{label}: log in {job.log}", flush=True)
            started = time.monotonic()
            code, interrupted = self._run_job(job)
            while code == 2 and not interrupted and lock.holder(job.folder):  # somebody else was faster
                interrupted = not self._wait_for_another(job, label)
                if not interrupted and job.state not in ("completed", "stopped"):
                    code, interrupted = self._run_job(job)
                else:
                    code = 0
            print(f"{label}: {_describe_end(job, code)} after {time.monotonic() - started:.1f} s", flush=True)
            write_summary(self.folder, self.jobs)
            if interrupted:
                break
        return self._finish(interrupted)

    def _wait_for_another(self, job: Job, label: str) -> bool:
        """Until no other process runs the job; False after Ctrl-C, which leaves that process alone."""
        shown = None
        try:
            while (holder := lock.holder(job.folder)) is not None:
                if holder != shown:
                    print(f"{label}: waiting for {holder}, which runs this job", flush=True)
                    shown = holder
                time.sleep(WAIT_SECONDS)
        except KeyboardInterrupt:
            print(f"\n{shown or 'the job'} goes on", file=sys.stderr)
            return False
        return True

    def _run_job(self, job: Job) -> tuple[int, bool]:
        """(exit code, whether Ctrl-C came). The child has a session of its own, so that a Ctrl-C on the terminal reaches
        it once, through us, and it can save its checkpoint. A second Ctrl-C is passed on too: the run then leaves at once.
        """
        log = job.log
        command = self.command(job)
        try:
            _claim(job)
            log.parent.mkdir(exist_ok=True)
            output = log.open("a")
        except OSError as error:
            raise _not_writable(log, error) from error
        with output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
            interrupted = False
            while True:
                try:
                    return process.wait(), interrupted
                except KeyboardInterrupt:
                    if not interrupted:
                        print("\nstopping the running job; it saves a checkpoint first", file=sys.stderr, flush=True)
                    interrupted = True
                    process.send_signal(signal.SIGINT)

    def _finish(self, interrupted: bool) -> int:
        write_summary(self.folder, self.jobs)
        started = [job.folder for job in self.jobs if job_results(job)]
        if started:
            write_comparison(started, self.folder / "comparison.html", self.folder.name)
        print("\n" + (self.folder / "summary.md").read_text())
        print(f"summary: {self.folder / 'summary.md'}" + (f"\ncomparison: {self.folder / 'comparison.html'}" if started else ""))
        unfinished = [job for job in self.jobs if job.state != "completed"]
        if interrupted:
            print(f"interrupted; {len(unfinished)} jobs are left. The same command continues the sweep.", file=sys.stderr)
            return 130
        if unfinished:
            names = "".join(f"\n    {job.name}: {job.state}, see {job.log}" for job in unfinished)
            print(f"{len(unfinished)} of {len(self.jobs)} jobs did not complete:{names}", file=sys.stderr)
            return 1
        return 0


def _claim(job: Job) -> None:
    """The job's folder, made by this program; UserError where something else lies there."""
    from runner.run.checkpoint import complete
    from runner.run.folder import claim

    if not complete(job.folder):
        claim(job.folder)


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}", key="outputs_dir", fix="outputs_dir=<a writable folder>")


def _describe_end(job: Job, code: int) -> str:
    """A job's end in words: its own state, and the exit code where the two do not fit."""
    state = job.state
    if state == "completed" and code == 0:
        return state
    try:
        status = read_status(job.folder)
    except UserError:
        status = None
    last_words = job.log.read_text(errors="replace").strip().splitlines()[-1:]
    message = status["message"].splitlines()[:1] if status and status["message"] else last_words
    return f"{state} (exit code {code})" + "".join(f": {line}" for line in message)
