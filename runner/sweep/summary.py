"""summary.csv and summary.md of a sweep: a row per job, and means over seeds."""

from __future__ import annotations

import csv
import io
import statistics
import sys
from pathlib import Path

from runner.errors import UserError
from runner.storage import atomic_write
from runner.sweep.jobs import Job
from runner.tracking.charts import format_number
from runner.tracking.report import key_results, read_run

COLUMNS = (("reward", "reward"), ("eval", "best eval"), ("mismatch", "mismatch"), ("seconds", "seconds"))


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
