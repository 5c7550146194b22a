"""`python -m runner -m key=a,b,c`: one fresh process per job, a summary, a comparison; restartable.

    outputs/<sweep>/<key=value,...>/   a run's folder per job, with logs/sweep.log
    outputs/<sweep>/summary.{md,csv}   comparison.html   sweep.json

Hydra's own multirun runs every job in one process, where CUDA, Ray and wandb leak from one to the next, and it cannot be
continued. The sweep's folder is named by a hash of its overrides and of every job's composed config, so the same command
finds the same folder: jobs that completed, or that a watch rule stopped, are skipped, those that were interrupted, killed or
failed go on from their last checkpoint, and those without a checkpoint start again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString
from hydra.errors import HydraException

from runner import lock
from runner.cli.overrides import override, override_key, readable, shell, typed
from runner.errors import UserError, UserErrors
from runner.redaction import shown
from runner.schema import Config
from runner.storage import atomic_write
from runner.tracking.charts import format_number
from runner.tracking.folder import plain_config, read_status, run_state
from runner.tracking.report import key_results, read_run, write_comparison

MAX_NAME = 120  # characters of a job's folder name; a longer one is cut and hashed
WAIT_SECONDS = 0.5  # between looks at a job that another process runs
COLUMNS = (("reward", "reward"), ("eval", "best eval"), ("mismatch", "mismatch"), ("seconds", "seconds"))


@dataclass(frozen=True)
class Job:
    """One point of the sweep. `point`: the swept keys and this job's values; `overrides`: all of the job's overrides."""

    name: str
    point: dict[str, str]
    overrides: list[str]
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "logs" / "sweep.log"

    @property
    def state(self) -> str:
        """As in status.json; a process that ended before it wrote one has failed."""
        state = run_state(self.folder)
        return "failed" if state == "not started" and self.log.exists() else state


def expand(overrides: list[str]) -> list[tuple[dict[str, str], list[str]]]:
    """(swept keys and values, all overrides) of every job: the product of `a=1,2`, `a=choice(..)` and `a=range(..)`.

    The last swept key varies fastest. A value that is named twice, however it is spelt, is one value; a key that is swept twice
    takes all its values. Raises UserError for an override that does not parse or cannot be listed, and for a key that is both
    swept and set.
    """
    swept, fixed = swept_values(overrides)
    jobs = []
    for values in itertools.product(*(choices.values() for choices in swept.values())):
        point = dict(zip(swept, values, strict=True))
        jobs.append((point, [*fixed, *(f"{key}={value}" for key, value in point.items())]))
    return jobs


def swept_values(overrides: list[str]) -> tuple[dict[str, dict[Any, str]], list[str]]:
    """(swept key -> {what a value means: how it is written}, the overrides that are not swept)."""
    swept: dict[str, dict[Any, str]] = {}
    fixed: list[str] = []
    for text, item in _parsed(overrides):
        if not item.is_sweep_override():
            fixed.append(text)
        elif item.is_discrete_sweep() and not isinstance(item.value(), Glob):
            choices = swept.setdefault(item.get_key_element(), {})
            for value in item.sweep_iterator():
                choices.setdefault(_meaning(value), Override._get_value_element_as_str(value))
        else:
            raise UserError(f"{text!r} cannot be listed", fix=f"name the values: {item.get_key_element()}=a,b,c")
    for key in sorted({override_key(item) for item in fixed} & {override_key(key) for key in swept}):
        raise UserError("is swept, and set to one value too", key=key, fix="leave one of the two out")
    return swept, fixed


def _parsed(overrides: list[str]) -> Iterator[tuple[str, Override]]:
    parser = OverridesParser.create()
    for text in readable(overrides):
        try:
            yield text, parser.parse_override(text)
        except (HydraException, ValueError) as error:
            raise UserError(f"cannot read {text!r}: {str(error).splitlines()[0]}", fix="key=value,value,...") from error


def _meaning(value: Any) -> Any:
    """Equal for spellings of one value: 1e-4 and 0.0001, a and 'a'; not for true and 1."""
    plain = value.text if isinstance(value, QuotedString) else value
    return (isinstance(plain, bool), plain) if isinstance(plain, Hashable) else repr(plain)


def merged(overrides: list[str]) -> list[str]:
    """What `expand` made of values named twice and keys swept twice, in words."""
    named: dict[str, list[int]] = {}  # how many values each override of a key names
    for _, item in _parsed(overrides):
        if item.is_sweep_override():
            named.setdefault(item.get_key_element(), []).append(sum(1 for _ in item.sweep_iterator()))
    notes = []
    for key, choices in swept_values(overrides)[0].items():
        if len(named[key]) > 1:
            notes.append(f"{key} is swept {len(named[key])} times; its values together: {', '.join(choices.values())}")
        elif named[key][0] > len(choices):
            notes.append(f"{key} names a value more than once, which is one run: {', '.join(choices.values())}")
    return notes


def job_name(point: dict[str, str]) -> str:
    """`key=value,key=value` as a folder name; characters that a shell or a file system minds become `_`."""
    name = ",".join(f"{key.lstrip('+~')}={value}" for key, value in point.items()) or "job"
    safe = re.sub(r"[^\w.=,+@-]+", "_", name)
    if safe == name and len(safe) <= MAX_NAME:
        return safe
    return f"{safe[:MAX_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"  # two values must not share a folder


def plan(overrides: list[str], load: Callable[[list[str]], Config]) -> tuple[Path, list[Job]]:
    """The sweep's folder and its jobs, every config composed and checked by `load` first.

    Raises UserErrors with the problems of every job (each problem once).
    """
    problems: dict[str, UserError] = {}
    points, configs = expand(overrides), []
    for _, job_overrides in points:
        try:
            configs.append(load(job_overrides))
        except UserError as error:
            for one in error.errors if isinstance(error, UserErrors) else [error]:
                problems.setdefault(str(one), one)
    if problems:
        raise UserErrors(list(problems.values()))
    identity = json.dumps([sorted(overrides), [plain_config(cfg, secrets=True) for cfg in configs]], sort_keys=True)
    keys = "+".join(key.lstrip("+~") for key in points[0][0]) or "single"
    name = f"sweep_{re.sub(r'[^A-Za-z0-9_.+-]+', '_', keys)[:80]}_{hashlib.sha256(identity.encode()).hexdigest()[:10]}"
    folder = Path(configs[0].outputs_dir) / name
    jobs = []
    for point, job_overrides in points:
        name = job_name(point)
        jobs.append(Job(name, point, job_overrides, folder / name))
    return folder, jobs


def run_command(job: Job) -> list[str]:
    """The process of a job: a new run in its folder, or the continuation of one that has a complete checkpoint."""
    from runner.checkpoint import complete

    start = [sys.executable, "-m", "runner", "run"]
    if complete(job.folder):
        return [*start, override("resume", str(job.folder))]
    # The sweep's folder is part of the name, not of outputs_dir: cached warm starts under outputs_dir stay shared.
    return [*start, *job.overrides, override("run_name", f"{job.folder.parent.name}/{job.name}"), *group_override(job)]


def group_override(job: Job) -> list[str]:
    """The runs of a sweep are one wandb group, unless the user named one."""
    named = any(text.lstrip("+").startswith("tracking.group=") for text in job.overrides)
    return [] if named else [override("tracking.group", job.folder.parent.name)]


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
            print(f"{label}: {describe_end(job, code)} after {time.monotonic() - started:.1f} s", flush=True)
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
            claim(job)
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


def claim(job: Job) -> None:
    """The job's folder, made by this program; UserError where something else lies there."""
    from runner.checkpoint import complete
    from runner.folder import claim

    if not complete(job.folder):
        claim(job.folder)


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}", key="outputs_dir", fix="outputs_dir=<a writable folder>")


def describe_end(job: Job, code: int) -> str:
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


def job_results(job: Job) -> dict[str, float]:
    """Key results of a job; none before it has metrics, or where its files are damaged: one job does not hide the others."""
    if not (job.folder / "metrics.jsonl").exists():
        return {}
    try:
        return key_results(read_run(job.folder))
    except UserError as error:
        print(f"warning: {job.name} is left out of the summary: {error}", file=sys.stderr)
        return {}


def summary_rows(jobs: list[Job]) -> tuple[list[str], list[list[str]]]:
    """(columns, one row per job): swept values, state, and the key results of jobs that have metrics."""
    keys = list(jobs[0].point)
    rows = []
    for job in jobs:
        results = job_results(job)
        cells = [format_number(results[key]) if key in results else "" for key, _ in COLUMNS]
        rows.append([*job.point.values(), job.state, *cells])
    return [*keys, "state", *(title for _, title in COLUMNS)], rows


def seed_rows(jobs: list[Job]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of means over `seed`, as `mean ± sample standard deviation`; only completed jobs count."""
    keys = [key for key in jobs[0].point if key != "seed"]
    groups: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for job in jobs:
        results = groups.setdefault(tuple(job.point[key] for key in keys), [])
        if job.state == "completed":
            results.append(job_results(job))
    rows = []
    for values, results in groups.items():
        cells = []
        for key, _ in COLUMNS:
            numbers = [result[key] for result in results if key in result]
            spread = f" ± {format_number(statistics.stdev(numbers), 2)}" if len(numbers) > 1 else ""
            cells.append(format_number(statistics.mean(numbers)) + spread if numbers else "")
        rows.append([*values, str(len(results)), *cells])
    return [*keys, "seeds", *(title for _, title in COLUMNS)], rows


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """An aligned table."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in [columns, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def write_summary(folder: Path, jobs: list[Job]) -> None:
    """summary.csv (a row per job) and summary.md (the same, and means where `seed` is swept)."""
    columns, rows = summary_rows(jobs)
    text = markdown(columns, rows)
    if "seed" in jobs[0].point:
        text += "\nMean over seeds ± sample standard deviation, completed jobs only:\n\n" + markdown(*seed_rows(jobs))
    atomic_write(folder / "summary.md", text)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    atomic_write(folder / "summary.csv", table.getvalue())


def main(overrides: list[str]) -> int:
    """Expand, check every job, run. Raises UserError before anything starts when a job's config is wrong."""
    from runner.compose import load_config

    folder, jobs = plan(overrides, load_config)
    for note in merged(overrides):
        print(f"note: {note}", file=sys.stderr, flush=True)
    return Sweep(folder, jobs).run()
