"""Where a run's metrics go: JSONL, status, console, the report and the option of `tracking`, behind one `Tracker`.

The driver alone tracks. Trackers that are not wanted are absent from the list, so nobody asks `if wandb:`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_class

from runner.config.schema import Config
from runner.errors import Failure, UserError
from runner.storage import atomic_write
from runner.tracking import pictures as pictured
from runner.tracking import timeline
from runner.tracking.base import NONE, POOL_DECISION, BaseTracker, Progress, State
from runner.tracking.console import build_console
from runner.tracking.folder import (
    Problem,
    encode_number,
    event_problem,
    metrics_problem,
    read_jsonl,
    read_status,
    rollout_files,
    salvage_jsonl,
    write_environment,
    write_resolved,
    write_status,
)

if TYPE_CHECKING:
    import numpy as np

    from runner.tracking.timeline import Span

REPORT_INTERVAL_SECONDS = 20.0  # at least, between refreshes of report.html while the run goes on
REPORT_TIME_SHARE = 0.01  # of a run's time that refreshes may take: long runs have slow reports


class JsonlTracker(BaseTracker):
    """metrics.jsonl (one strict JSON object per line), timeline.jsonl, events.jsonl and rollouts/step_N.jsonl.

    `first_step` is the step that a resumed run does next: lines of that step and later are dropped, because the run
    stopped after its last checkpoint and is about to do them again. Events are history and stay, with their attempt.
    Damaged lines are left out; `notes` says so, and the file as it was stays beside the new one.
    """

    in_folder = True

    def __init__(self, run_dir: Path, first_step: int = 0, *, resumed: bool = False) -> None:
        self.run_dir = run_dir
        self.notes: list[str] = []
        self._sizes: dict[str, int] = {}  # of each file when this process wrote to it last
        (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
        events = self._intact("events.jsonl", _event_problem) if resumed else []
        self.attempt = 1 + max((row["attempt"] for row in events), default=0)
        self._rewrite("events.jsonl", events)
        self._go_back(
            first_step, self._intact("metrics.jsonl", metrics_problem), self._intact("timeline.jsonl", timeline.problem)
        )
        if resumed:
            self._note_lost_steps(first_step)

    def _intact(self, name: str, problem: Problem) -> list[dict[str, Any]]:
        path = self.run_dir / name
        rows, damaged = salvage_jsonl(path, problem)
        if damaged:
            kept = path.with_name(f"{name}.damaged_{time.time_ns()}")
            path.rename(kept)
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            self.notes.append(f"{path}: {damaged[0]}{more}; left out, the file as it was is {kept.name}")
        return rows

    def _note_lost_steps(self, first_step: int) -> None:
        there = {row["step"] for row in read_jsonl(self.run_dir / "metrics.jsonl")}
        if lost := first_step - len(there):
            self.notes.append(f"{self.run_dir / 'metrics.jsonl'} has no line of {lost} of the {first_step} steps before this one")

    def rewind(self, first_step: int) -> None:
        spans = read_jsonl(self.run_dir / "timeline.jsonl", timeline.problem)
        self._go_back(first_step, read_jsonl(self.run_dir / "metrics.jsonl", metrics_problem), spans)

    def _go_back(self, first_step: int, rows: list[dict[str, Any]], spans: list[dict[str, Any]]) -> None:
        self.step = first_step  # the step an event belongs to: the one that is being done
        self._rewrite("metrics.jsonl", [row for row in rows if row["step"] < first_step])
        self._rewrite("timeline.jsonl", [row for row in spans if row["step"] < first_step])
        for step, path in rollout_files(self.run_dir):
            if step >= first_step:
                path.unlink()
                shutil.rmtree(pictured.folder_of(path.parent, step), ignore_errors=True)

    def _rewrite(self, name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        atomic_write(self.run_dir / name, text)
        self._sizes[name] = len(text)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        """The file is opened, not made: one that is gone, or shorter than it was, lost lines that no later one makes up for."""
        path = self.run_dir / name
        try:
            line = (json.dumps(row, allow_nan=False) + "\n").encode()
            with open(path, "ab", opener=_existing) as file:  # closed, hence flushed, after every line
                size = os.fstat(file.fileno()).st_size
                if size < self._sizes[name]:
                    raise Failure(f"{path} was cut short while the run went on", key="outputs_dir")
                file.write(line)
            self._sizes[name] = size + len(line)
        except FileNotFoundError:
            raise Failure(f"{path} was deleted while the run went on", key="outputs_dir") from None
        except OSError as error:
            raise Failure(f"cannot write {path}: {error.strerror or error}", fix="free some space") from error

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.step = step + 1
        self._append("metrics.jsonl", {"step": step} | {key: encode_number(value) for key, value in metrics.items()})

    def log_samples(self, step: int, rows: list[dict[str, Any]], pictures: Mapping[str, np.ndarray] = NONE) -> None:
        if pictures:
            pictured.write(self.run_dir / "rollouts", step, pictures)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write(self.run_dir / "rollouts" / f"step_{step}.jsonl", text)

    def log_timeline(self, step: int, spans: list[Span]) -> None:
        self._append("timeline.jsonl", timeline.row(step, spans))

    def event(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        data = data or {}
        step = data.get("step", self.step)  # what is said of a step after it was logged names it
        row = {"time": round(time.time(), 3), "attempt": self.attempt, "step": step, "kind": kind, "message": message}
        self._append("events.jsonl", row | {"data": data})


def _existing(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT)


def _event_problem(row: dict[str, Any]) -> str | None:
    """A decision that is repeated must be whole."""
    if (problem := event_problem(row)) or row["kind"] != POOL_DECISION:
        return problem
    whole = isinstance(row["data"].get("step"), int) and isinstance(row["data"].get("decision"), dict)
    return None if whole else "it has no decision"


class StatusTracker(BaseTracker):
    """status.json after every step."""

    in_folder = True

    def __init__(self, run_dir: Path, first_step: int = 0) -> None:
        self.run_dir = run_dir
        self.notes: list[str] = []
        try:
            read_status(run_dir)
        except UserError as error:
            self.notes.append(f"{error.problem}; it is written anew")
        self.rewind(first_step)

    def rewind(self, first_step: int) -> None:
        self.steps_done = first_step
        write_status(self.run_dir, "running", step=first_step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.steps_done = step + 1
        write_status(self.run_dir, "running", step=self.steps_done)

    def finish(self, status: State, summary: dict[str, float], message: str = "") -> None:
        write_status(self.run_dir, status, step=self.steps_done, message=message, summary=summary)


class ReportTracker(BaseTracker):
    """report.html, refreshed while the run goes on and complete at its end."""

    in_folder = True

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.next_write = time.monotonic() + REPORT_INTERVAL_SECONDS

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if time.monotonic() >= self.next_write:
            self._write()

    def finish(self, status: State, summary: dict[str, float], message: str = "") -> None:
        self._write()

    def _write(self) -> None:
        from runner.tracking.report import write_report

        started = time.monotonic()
        write_report(self.run_dir)
        now = time.monotonic()
        self.next_write = now + max(REPORT_INTERVAL_SECONDS, (now - started) / REPORT_TIME_SHARE)


def _nothing() -> None:
    return


class CompositeTracker:
    """Passes every call to each tracker in turn. `check` raises when the folder is no longer the run's, and is asked first."""

    def __init__(self, trackers: list[BaseTracker], check: Callable[[], None] = _nothing) -> None:
        self.trackers, self.check = trackers, check

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.check()
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def log_samples(self, step: int, rows: list[dict[str, Any]], pictures: Mapping[str, np.ndarray] = NONE) -> None:
        self.check()
        for tracker in self.trackers:
            tracker.log_samples(step, rows, pictures)

    def log_timeline(self, step: int, spans: list[Span]) -> None:
        self.check()
        for tracker in self.trackers:
            tracker.log_timeline(step, spans)

    def event(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        self.check()
        for tracker in self.trackers:
            tracker.event(kind, message, data)

    def rewind(self, first_step: int) -> None:
        self.check()
        for tracker in self.trackers:
            tracker.rewind(first_step)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Progress]:
        with ExitStack() as stack:
            yield _Together([stack.enter_context(tracker.progress(label, total)) for tracker in self.trackers])

    def finish(self, status: State, summary: dict[str, float], message: str = "") -> None:
        """Every tracker is finished even if one fails; the first failure is raised afterwards. Nothing is written into a folder
        that is no longer the run's."""
        failures: list[Exception] = []
        trackers = self.trackers
        try:
            self.check()
        except Failure as error:
            failures.append(error)
            trackers = [tracker for tracker in trackers if not tracker.in_folder]
        for tracker in trackers:
            try:
                tracker.finish(status, summary, message)
            except Exception as error:  # a full disk must not leave the terminal or wandb open
                failures.append(error)
        if failures:
            raise failures[0]


class LateTracker:
    """A tracker that is built by `open`. Until then nothing is written: a resume that is refused leaves the run as it was."""

    def __init__(self, build: Callable[[], CompositeTracker]) -> None:
        self._build = build
        self._built: CompositeTracker | None = None

    @property
    def is_open(self) -> bool:
        return self._built is not None

    def open(self) -> None:
        """Safe to call again."""
        self._built = self._built or self._build()

    def _tracker(self) -> CompositeTracker:
        assert self._built is not None, "tracked before it was opened"
        return self._built

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._tracker().log(step, metrics)

    def log_samples(self, step: int, rows: list[dict[str, Any]], pictures: Mapping[str, np.ndarray] = NONE) -> None:
        self._tracker().log_samples(step, rows, pictures)

    def log_timeline(self, step: int, spans: list[Span]) -> None:
        self._tracker().log_timeline(step, spans)

    def event(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        self._tracker().event(kind, message, data)

    def rewind(self, first_step: int) -> None:
        self._tracker().rewind(first_step)

    def progress(self, label: str, total: int) -> Any:
        return self._tracker().progress(label, total)

    def finish(self, status: State, summary: dict[str, float], message: str = "") -> None:
        if self._built is not None:
            self._built.finish(status, summary, message)


class _Together:
    def __init__(self, parts: list[Progress]) -> None:
        self.parts = parts

    def advance(self, amount: int = 1, note: str = "") -> None:
        for part in self.parts:
            part.advance(amount, note)


def build_tracker(cfg: Config, run_dir: Path, *, first_step: int = 0, check: Callable[[], None] = _nothing) -> CompositeTracker:
    """Open the run's folder for tracking: writes resolved.yaml, environment.json and status.json, then opens each tracker.

    `first_step`: the step done next, 0 in a fresh run, the checkpoint's step count in a resumed one. `check`: see
    CompositeTracker.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    write_resolved(run_dir, cfg)
    write_environment(run_dir, cfg)
    # The report comes after the status that it shows; the option of `tracking` last, so that its line is the last one printed.
    resumed = bool(cfg.resume)
    lines, status = JsonlTracker(run_dir, first_step, resumed=resumed), StatusTracker(run_dir, first_step)
    trackers: list[BaseTracker] = [lines, status, ReportTracker(run_dir), build_console(cfg, run_dir, first_step)]
    trackers.append(get_class(cfg.tracking._target_)(cfg, run_dir, first_step=first_step))
    tracker = CompositeTracker(trackers, check)
    for note in (*lines.notes, *status.notes):
        tracker.event("warning", note)
    return tracker
