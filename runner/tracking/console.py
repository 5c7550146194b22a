"""The run on the console: a live table on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from runner.config.schema import Config
from runner.tracking.base import BaseTracker, State
from runner.tracking.base import Progress as ProgressProtocol

PLAIN_PROGRESS_SECONDS = 10.0
TABLE_ROWS = 8
SPARK = "▁▂▃▄▅▆▇█"


class Column(NamedTuple):
    metric: str
    title: str
    format: str


COLUMNS = (
    Column("rollout/raw_reward", "reward", "{:.3f}"),
    Column("rollout/response_len/mean", "length", "{:.1f}"),
    Column("rollout/truncated_ratio", "truncated", "{:.3f}"),
    Column("train/train_rollout_logprob_abs_diff", "mismatch", "{:.5f}"),
    Column("train/entropy_loss", "entropy", "{:.3f}"),
    Column("train/grad_norm", "grad norm", "{:.3f}"),
    Column("rollout/spec_accept_length", "accepted", "{:.2f}"),
    Column("perf/rollout_time", "rollout s", "{:.2f}"),
    Column("perf/train_time", "train s", "{:.2f}"),
    Column("perf/step_time", "step s", "{:.2f}"),
)


def wants_live_table(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Only a terminal that can draw, and that nobody records: CI, NO_COLOR and TERM=dumb get plain lines."""
    return stream.isatty() and not environ.get("CI") and not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb"


def build_console(cfg: Config, run_dir: Path, first_step: int = 0) -> BaseTracker:
    if wants_live_table(sys.stdout, os.environ):
        return LiveConsole(run_dir, cfg.steps, first_step)
    return PlainConsole(run_dir, cfg.steps)


def sparkline(values: list[float], width: int) -> str:
    """Block characters, lowest value to highest; more values than `width` are averaged in equal parts."""
    if not values:
        return ""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(values), max(values)
    span = high - low
    return "".join(SPARK[int((value - low) / span * (len(SPARK) - 1) + 0.5)] if span > 0 else SPARK[0] for value in values)


def shown_evals(metrics: Mapping[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if k.startswith("eval/") and not k.endswith("_response_len")}


class PlainConsole(BaseTracker):
    """Lines that read well in a log file: no colours, no control characters."""

    def __init__(self, run_dir: Path, steps: int, stream: TextIO | None = None) -> None:
        self.run_dir = run_dir
        self.steps = steps
        self.stream = stream

    def _print(self, line: str) -> None:
        print(line, file=self.stream or sys.stdout, flush=True)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        shown = [
            f"{column.title} {column.format.format(metrics[column.metric])}" for column in COLUMNS if column.metric in metrics
        ]
        shown += [f"{key} {value:.3f}" for key, value in shown_evals(metrics).items()]
        self._print(f"step {step + 1:>{len(str(self.steps))}}/{self.steps}  " + "  ".join(shown))

    def event(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        self._print(f"[{kind}] {message}")

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[ProgressProtocol]:
        bar = _PlainProgress(self._print, label, total)
        yield bar
        bar.close()

    def finish(self, status: State, summary: dict[str, float], message: str = "") -> None:
        self._print("\n".join(closing_lines(self.run_dir, status, summary, message)))


class _PlainProgress:
    """One line at most every PLAIN_PROGRESS_SECONDS, and one at the end."""

    def __init__(self, write: Any, label: str, total: int) -> None:
        self.write, self.label, self.total = write, label, total
        self.done, self.note = 0, ""
        self.started = self.last = time.monotonic()

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        self.note = note or self.note
        if time.monotonic() - self.last >= PLAIN_PROGRESS_SECONDS:
            self.last = time.monotonic()
            self.write(f"{self.label}: {self.done}/{self.total} {self.note}".rstrip())

    def close(self) -> None:
        seconds = time.monotonic() - self.started
        self.write(f"{self.label}: {self.done}/{self.total} in {seconds:.1f} s {self.note}".rstrip())


class LiveConsole(BaseTracker):
    """The last steps as a table, the reward so far as a sparkline, and a bar for the steps and for each long part."""

    def __init__(self, run_dir: Path, steps: int, first_step: int = 0, console: Console | None = None) -> None:
        self.run_dir = run_dir
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.rewards: dict[int, float] = {}  # step -> of every step of this process
        self.evals: dict[str, float] = {}
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.step_bar = self.bars.add_task("steps", total=steps, completed=first_step, note="")
        self.live = Live(self._picture(), console=console or Console(), refresh_per_second=4, transient=False)
        self.live.start()

    def _picture(self) -> RenderableType:
        width = self.live.console.width if hasattr(self, "live") else 80
        if not self.rows:
            return Group(Text(str(self.run_dir), style="bold"), self.bars)
        columns = [column for column in COLUMNS if any(column.metric in row for _, row in self.rows)]
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        table.add_column("step", justify="right")
        for column in columns[: max(2, (width - 6) // 11)]:  # a narrow terminal shows the first ones
            table.add_column(column.title, justify="right")
        for step, row in self.rows:
            cells = [column.format.format(row[column.metric]) if column.metric in row else "" for column in columns]
            table.add_row(str(step + 1), *cells[: len(table.columns) - 1])
        lines: list[RenderableType] = [Text(str(self.run_dir), style="bold"), table]
        if self.rewards:
            rewards = list(self.rewards.values())
            curve = sparkline(rewards, min(60, width - 24))
            lines.append(Text.assemble(("reward ", "dim"), (curve, "green"), f" {rewards[-1]:.3f}"))
        if self.evals:
            lines.append(Text("  ".join(f"{key} {value:.3f}" for key, value in self.evals.items())))
        return Group(*lines, self.bars)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self.rows and self.rows[-1][0] == step:
            self.rows[-1][1].update(metrics)
        else:
            self.rows = [*self.rows, (step, dict(metrics))][-TABLE_ROWS:]
        if "rollout/raw_reward" in metrics:
            self.rewards[step] = metrics["rollout/raw_reward"]
        self.evals.update(shown_evals(metrics))
        self.bars.update(self.step_bar, completed=step + 1)
        self.live.update(self._picture())

    def rewind(self, first_step: int) -> None:
        self.rows = [(step, row) for step, row in self.rows if step < first_step]
        self.rewards = {step: reward for step, reward in self.rewards.items() if step < first_step}
        self.bars.update(self.step_bar, completed=first_step)
        self.live.update(self._picture())

    def event(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        self.live.console.print(Text.assemble((f"[{kind}] ", "yellow"), message))

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[ProgressProtocol]:
        task = self.bars.add_task(label, total=total, note="")
        try:
            yield _LiveProgress(self.bars, task)
        finally:
            self.bars.remove_task(task)

    def finish(self, status: State, summary: dict[str, float], message: str = "") -> None:
        self.live.update(self._picture(), refresh=True)
        self.live.stop()
        for line in closing_lines(self.run_dir, status, summary, message):
            self.live.console.print(Text(line))


class _LiveProgress:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self.bars, self.task = bars, task

    def advance(self, amount: int = 1, note: str = "") -> None:
        if note:
            self.bars.update(self.task, advance=amount, note=note)
        else:
            self.bars.update(self.task, advance=amount)


def closing_lines(run_dir: Path, status: str, summary: Mapping[str, float], message: str) -> list[str]:
    """What a reader wants after the last step: how it ended, the numbers, and where everything lies."""
    lines = [message if message.startswith(status) else f"{status}: {message}" if message else status]
    if summary:
        lines.append("  ".join(f"{key} {value:.4g}" for key, value in summary.items()))
    return [*lines, f"report: {run_dir / 'report.html'}"]
