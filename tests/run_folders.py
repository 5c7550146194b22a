"""Folders of runs, with checkpoints that hold a byte; and where the time of a run's steps went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from runner.config import schema
from runner.run import checkpoint, folder
from runner.tracking.base import STEP_PARTS
from tests.configs import composed


def config(outputs: Path, name: str | None = None, resume: Path | None = None) -> schema.Config:
    cfg = composed()
    cfg.outputs_dir, cfg.run_name, cfg.resume = str(outputs), name, str(resume) if resume else None
    return cfg


def saved(run: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(run, step, {}, lambda place: (place / "weights").write_bytes(b"w"), keep=99)


def made(outputs: Path, *steps: int) -> Path:
    """A run's folder with checkpoints, closed."""
    with folder.open_folder(config(outputs, "run"), ["seed=1"]) as opened:
        saved(opened.path, *steps)
        return opened.path


def unclocked(rows: Sequence[dict[str, float]]) -> float:
    """The share of a step's time that no part of it accounts for: the median of the steps, because whoever shares the cores may
    take a turn between two clocks. No second is counted twice in any."""
    rest = [1 - sum(row.get(part, 0.0) for part in STEP_PARTS) / row["perf/step_time"] for row in rows]
    assert min(rest) > -1e-6
    return statistics.median(rest)
