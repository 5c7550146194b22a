"""A run's folder: where it lies, who writes into it, what it may overwrite, and how `resume=` finds it again."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from runner.config.overrides import shell, typed
from runner.config.recorded import OVERRIDES, find_run, write_overrides
from runner.config.rules.names import name_problem
from runner.config.schema import Config
from runner.errors import Failure, UserError
from runner.lock import NAME as LOCK
from runner.lock import Held, Lock
from runner.run import checkpoint
from runner.tracking.folder import read_status

CLEARED = (
    "metrics.jsonl",
    "timeline.jsonl",
    "status.json",
    "rollouts",
    "checkpoints",
)  # of an attempt that died before its first checkpoint
KEPT_WHILE_RUNNING = (str(OVERRIDES), "logs", "rollouts", "checkpoints")


@dataclass
class RunFolder:
    """A folder that this process alone writes into, until it is closed. `notes`: what the user should know about it."""

    path: Path
    resumed_from: Path | None  # the checkpoint that a resumed run starts at
    lock: Lock
    notes: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises Failure when the folder, or what a run needs in it, was deleted or replaced since it was opened."""
        if not self.lock.in_place():
            raise Failure(f"{self.path} was deleted or replaced while the run went on", key="outputs_dir")
        missing = [name for name in KEPT_WHILE_RUNNING if not (self.path / name).exists()]
        if missing:
            raise Failure(f"{', '.join(missing)} in {self.path} was deleted while the run went on", key="outputs_dir")

    def keep_overrides(self, overrides: list[str]) -> None:
        """From now on `resume=` starts from these: what a resume changes is part of the run."""
        write_overrides(self.path, overrides)

    def close(self) -> None:
        self.lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_folder(cfg: Config, overrides: list[str]) -> RunFolder:
    """Create the folder of a new run, or find the one of `resume`, and lock it. Raises UserError, also where a living process
    writes into it; a finished run and a folder of somebody else are never touched."""
    return _resumed(cfg) if cfg.resume else _new(cfg, overrides)


def _resumed(cfg: Config) -> RunFolder:
    assert cfg.resume is not None
    path = find_run(cfg.resume, cfg.outputs_dir)
    if not checkpoint.complete(path):
        checkpoint.latest(path)  # raises: nothing is written into a folder that has nothing to resume
    notes: list[str] = []
    lock = _locked(path, "resume")
    try:
        begin = checkpoint.latest(path, warn=notes.append)
        for part in KEPT_WHILE_RUNNING[1:]:
            (path / part).mkdir(exist_ok=True)
    except BaseException as error:
        lock.release()
        if isinstance(error, OSError):
            raise _not_writable(path, error) from error
        raise
    return RunFolder(path, begin, lock, notes)


def _new(cfg: Config, overrides: list[str]) -> RunFolder:
    name = cfg.run_name or time.strftime("%Y-%m-%d_%H-%M-%S") + f"_{os.getpid()}"
    if problem := name_problem(name):
        raise UserError(f"{name!r} {problem}", key="run_name", fix="run_name=<a name>")
    path = Path(cfg.outputs_dir) / name
    _claim(path)
    lock = _locked(path, "run_name")
    try:
        notes = _clear(path)
        for part in (".hydra", *KEPT_WHILE_RUNNING[1:]):
            (path / part).mkdir(exist_ok=True)
        write_overrides(path, overrides)
    except BaseException as error:
        lock.release()
        if isinstance(error, OSError):
            raise _not_writable(path, error) from error
        raise
    return RunFolder(path, None, lock, notes)


def claim(path: Path) -> None:
    """Make the folder of a run to come, for a process that writes a log into it before the run starts."""
    _claim(path)
    (path / LOCK).touch()


def _claim(path: Path) -> None:
    """Make the folder, or see that runner made it: nothing else is ever cleared."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file in its place is one of them
        raise _not_writable(path, error) from error
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise UserError(f"{path} is no folder", key="run_name", fix="another run_name") from None
    except OSError as error:
        raise _not_writable(path, error) from error
    if not _made_here(path):
        raise UserError(
            f"{path} is there already and is not the folder of a run: it stays as it is", key="run_name", fix="another run_name"
        )


def _made_here(path: Path) -> bool:
    try:
        names = {entry.name for entry in path.iterdir()}
        if not names:
            return True
        if "sweep.json" in names:  # the folder of a sweep, whose jobs are runs
            return False
        # before there were locks, a run left these three
        return LOCK in names or (
            {"resolved.yaml", "environment.json"} <= names and "attempt_started" in (read_status(path) or {})
        )
    except (OSError, UserError):
        return False


def _locked(path: Path, key: str) -> Lock:
    try:
        return Lock(path)
    except Held as held:
        raise UserError(
            f"{path} is being written by {held.by}",
            key=key,
            fix="wait for it or stop it with Ctrl-C; another run_name starts another run",
        ) from None
    except OSError as error:
        raise _not_writable(path, error) from error


def _clear(path: Path) -> list[str]:
    """Remove what an attempt left that ended before its first checkpoint; says so. UserError where there is one, even damaged."""
    saved = checkpoint.complete(path)
    if saved or checkpoint.damaged(path):
        raise UserError(
            f"{path} already holds a run with {'checkpoints' if saved else 'damaged checkpoints'}",
            key="run_name",
            fix=f"{shell(typed('resume', str(path)))} continues it; another run_name starts a new one"
            if saved
            else "another run_name",
        )
    found = [name for name in CLEARED if (path / name).exists()]
    for name in found:
        _remove(path / name)
    had = [name for name in found if name not in ("rollouts", "checkpoints")]
    return [f"{path}: an earlier attempt ended before its first checkpoint; this run takes its place"] if had else []


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write the run's folder {path}: {error.strerror}", key="outputs_dir", fix="outputs_dir=<a writable folder>"
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:  # of a link, the link alone
        path.unlink(missing_ok=True)
