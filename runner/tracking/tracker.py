"""Where a run's metrics go: JSONL, status, console, wandb and the report, behind one `Tracker`.

The driver alone tracks. Trackers that are not wanted are absent from the list, so nobody asks `if wandb:`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from runner.errors import UserError
from runner.schema import Config
from runner.tracking.folder import (
    atomic_write,
    encode_number,
    plain_config,
    read_jsonl,
    write_environment,
    write_resolved,
    write_status,
)

REPORT_INTERVAL_SECONDS = 20.0  # at least, between refreshes of report.html while the run goes on
REPORT_TIME_SHARE = 0.01  # of a run's time that refreshes may take: long runs have slow reports


class Progress(Protocol):
    def advance(self, amount: int = 1, note: str = "") -> None:
        """`amount` more of the total is done; `note` replaces the text beside the bar."""
        ...


class Tracker(Protocol):
    """Metric names are those of the field (`train/grad_norm`, `rollout/raw_reward`, `eval/<name>`, ...)."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """The metrics of one finished step, counted from 0. May be called again for the same step (evaluation)."""
        ...

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A few samples as JSON objects; `prompt`, `response` and `reward` are shown in the report."""
        ...

    def event(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        """Something a reader of the run must know: a watch rule fired, a step was skipped, speculation went off."""
        ...

    def rewind(self, first_step: int) -> None:
        """The run goes back to a checkpoint: `first_step` is done next, and what was logged of it and later is dropped."""
        ...

    def progress(self, label: str, total: int) -> Any:
        """A context manager that gives a `Progress` for a long part outside of the steps (warm start, evaluation)."""
        ...

    def finish(self, status: str, summary: dict[str, float], message: str = "") -> None:
        """The last call. `status` is one of runner.tracking.folder.STATES."""
        ...


class SilentProgress:
    def advance(self, amount: int = 1, note: str = "") -> None:
        return


class BaseTracker:
    """Does nothing: trackers override what concerns them."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        return

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        return

    def event(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        return

    def rewind(self, first_step: int) -> None:
        return

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Progress]:
        yield SilentProgress()

    def finish(self, status: str, summary: dict[str, float], message: str = "") -> None:
        return


class JsonlTracker(BaseTracker):
    """metrics.jsonl (one strict JSON object per line), events.jsonl and rollouts/step_N.jsonl.

    `first_step` is the step that a resumed run does next: lines of that step and later are dropped, because the run
    stopped after its last checkpoint and is about to do them again. Events are history and stay, with their attempt.
    """

    def __init__(self, run_dir: Path, first_step: int = 0, *, resumed: bool = False) -> None:
        self.run_dir = run_dir
        events = read_jsonl(run_dir / "events.jsonl") if resumed else []
        self.attempt = 1 + max((row["attempt"] for row in events), default=0)
        atomic_write(run_dir / "events.jsonl", "".join(json.dumps(row) + "\n" for row in events))
        self.rewind(first_step)

    def rewind(self, first_step: int) -> None:
        self.step = first_step  # the step an event belongs to: the one that is being done
        kept = [row for row in read_jsonl(self.run_dir / "metrics.jsonl") if row["step"] < first_step]
        atomic_write(self.run_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        for path in (self.run_dir / "rollouts").glob("step_*.jsonl"):
            if int(path.stem.removeprefix("step_")) >= first_step:
                path.unlink()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        path = self.run_dir / name
        try:
            with path.open("a") as file:  # closed, hence flushed, after every line
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}", fix="free some space, then resume the run") from error

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.step = step + 1
        self._append("metrics.jsonl", {"step": step} | {key: encode_number(value) for key, value in metrics.items()})

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write(self.run_dir / "rollouts" / f"step_{step}.jsonl", text)

    def event(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        data = data or {}
        step = data.get("step", self.step)  # what is said of a step after it was logged names it
        row = {"time": round(time.time(), 3), "attempt": self.attempt, "step": step, "kind": kind, "message": message}
        self._append("events.jsonl", row | {"data": data})


class StatusTracker(BaseTracker):
    """status.json after every step."""

    def __init__(self, run_dir: Path, first_step: int = 0) -> None:
        self.run_dir = run_dir
        self.rewind(first_step)

    def rewind(self, first_step: int) -> None:
        self.steps_done = first_step
        write_status(self.run_dir, "running", step=first_step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.steps_done = step + 1
        write_status(self.run_dir, "running", step=self.steps_done)

    def finish(self, status: str, summary: dict[str, float], message: str = "") -> None:
        write_status(self.run_dir, status, step=self.steps_done, message=message, summary=summary)


class ReportTracker(BaseTracker):
    """report.html, refreshed while the run goes on and complete at its end."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.next_write = time.monotonic() + REPORT_INTERVAL_SECONDS

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if time.monotonic() >= self.next_write:
            self._write()

    def finish(self, status: str, summary: dict[str, float], message: str = "") -> None:
        self._write()

    def _write(self) -> None:
        from runner.tracking.report import write_report

        started = time.monotonic()
        write_report(self.run_dir)
        now = time.monotonic()
        self.next_write = now + max(REPORT_INTERVAL_SECONDS, (now - started) / REPORT_TIME_SHARE)


class CompositeTracker:
    """Passes every call to each tracker in turn."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        for tracker in self.trackers:
            tracker.log_samples(step, rows)

    def event(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        for tracker in self.trackers:
            tracker.event(kind, message, data)

    def rewind(self, first_step: int) -> None:
        for tracker in self.trackers:
            tracker.rewind(first_step)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Progress]:
        with ExitStack() as stack:
            yield _Together([stack.enter_context(tracker.progress(label, total)) for tracker in self.trackers])

    def finish(self, status: str, summary: dict[str, float], message: str = "") -> None:
        """Every tracker is finished even if one fails; the first failure is raised afterwards."""
        failures: list[Exception] = []
        for tracker in self.trackers:
            try:
                tracker.finish(status, summary, message)
            except Exception as error:  # a full disk must not leave the terminal or wandb open
                failures.append(error)
        if failures:
            raise failures[0]


class _Together:
    def __init__(self, parts: list[Progress]) -> None:
        self.parts = parts

    def advance(self, amount: int = 1, note: str = "") -> None:
        for part in self.parts:
            part.advance(amount, note)


def build_tracker(cfg: Config, run_dir: Path, *, first_step: int = 0) -> CompositeTracker:
    """Open the run's folder for tracking: writes resolved.yaml, environment.json and status.json, then opens each tracker.

    `first_step`: the step done next, 0 in a fresh run, the checkpoint's step count in a resumed one.
    """
    from runner.tracking.console import build_console

    run_dir.mkdir(parents=True, exist_ok=True)
    write_resolved(run_dir, cfg)
    write_environment(run_dir, cfg)
    # The report comes after the status that it shows; wandb last, so that its sync line is the last one printed.
    resumed = bool(cfg.resume)
    trackers: list[Tracker] = [
        JsonlTracker(run_dir, first_step, resumed=resumed),
        StatusTracker(run_dir, first_step),
        ReportTracker(run_dir),
        build_console(cfg, run_dir, first_step),
    ]
    if cfg.tracking.wandb_mode != "disabled":
        from runner.tracking.wandb_tracker import WandbTracker

        trackers.append(WandbTracker(cfg, plain_config(cfg), run_dir, resumed=resumed))
    return CompositeTracker(trackers)
