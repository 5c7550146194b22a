"""Folders of runs, with checkpoints that hold a byte."""

from __future__ import annotations

from pathlib import Path

from runner.config import schema
from runner.run import checkpoint, folder
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
