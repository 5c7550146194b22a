"""A run's folder: where it lies, what it may overwrite, and how `resume=` finds it again."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from runner import checkpoint
from runner.cli.overrides import shell, typed
from runner.errors import UserError
from runner.schema import Config

_current: Path | None = None  # of the run that this process drives


@dataclass(frozen=True)
class RunFolder:
    path: Path
    resumed_from: Path | None  # the checkpoint that a resumed run starts at


def open_folder(cfg: Config, overrides: list[str]) -> RunFolder:
    """Create the folder of a new run, or find the one of `resume`. Raises UserError, and never touches a finished run."""
    global _current
    if cfg.resume:
        path = find_run(cfg.resume, cfg.outputs_dir)
        _current = path
        return RunFolder(path, checkpoint.latest(path))
    path = Path(cfg.outputs_dir) / (cfg.run_name or time.strftime("%Y-%m-%d_%H-%M-%S") + f"_{os.getpid()}")
    if checkpoint.complete(path):
        raise UserError(
            f"{path} already holds a run with checkpoints",
            key="run_name",
            fix=f"{shell(typed('resume', str(path)))} continues it; another run_name starts a new one",
        )
    try:
        if path.exists():  # an attempt that died before its first checkpoint
            for name in ("metrics.jsonl", "status.json", "rollouts", "checkpoints"):
                _remove(path / name)
        for name in ("logs", ".hydra", "checkpoints", "rollouts"):
            (path / name).mkdir(parents=True, exist_ok=True)
        text = "".join(f"- {json.dumps(item, ensure_ascii=False)}\n" for item in overrides)
        (path / ".hydra" / "overrides.yaml").write_text(text or "[]\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write the run's folder {path}: {error.strerror}", key="outputs_dir", fix="outputs_dir=<a writable folder>"
        ) from error
    _current = path
    return RunFolder(path, None)


def logs_of_this_run() -> Path | None:
    """`logs/` of the run that this process drives, for components that start processes; None outside of a run."""
    return _current / "logs" if _current else None


def find_run(name: str, outputs_dir: str) -> Path:
    """The folder of a run given as a path or as a name under outputs_dir; raises UserError with the nearest names."""
    for path in (Path(name), Path(outputs_dir) / name):
        if (path / ".hydra" / "overrides.yaml").is_file():
            return path
    root = Path(outputs_dir)
    known = sorted(path.name for path in root.iterdir() if (path / ".hydra").is_dir()) if root.is_dir() else []
    close = difflib.get_close_matches(name, known, n=3) or known[-3:]
    hint = (
        shell(typed("resume", close[0])) + (f" (or {', '.join(close[1:])})" if close[1:] else "")
        if close
        else f"no run lies under {root} yet"
    )
    raise UserError(f"no run named {name!r} under {root}", key="resume", fix=hint)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
