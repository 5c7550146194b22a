"""Checkpoints of a run: written beside, checked, renamed; a kill at any moment leaves the last complete one loadable.

    checkpoints/step_000040/{manifest.json, state.json, trainer/...}

The manifest holds every file's size and xxh3-64 digest, and is written last. A folder without a manifest, or with a
leading dot, is never read.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from runner import storage
from runner.errors import Failure, UserError
from runner.trainer.protocol import Saved, Saving

MANIFEST = "manifest.json"
STATE = "state.json"
PARTIAL = ".partial_"
DAMAGED = "damaged_"
_NAME = re.compile(r"step_\d{6,18}")


class Checkpoints:
    """Writes a run's checkpoints through `begin(folder)`, which may go on writing while the run does; keeps the newest `keep`.

    A checkpoint is published, with its manifest, when all of it is on disk: at once, at a later `poll`, or at `join`.
    """

    def __init__(self, run_dir: Path, begin: Callable[[Path], Saving], keep: int) -> None:
        self.run_dir, self.root, self.keep = run_dir, run_dir / "checkpoints", keep
        self._begin = begin
        self._pending: tuple[int, Path, Saving] | None = None  # step, partial folder, what is being written into it

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None] = lambda folder: None) -> None:
        """Begin checkpoint `step`, after the one before it is complete. `write(folder)` adds what else belongs to it.

        Raises UserError when the disk is full or read-only; what was complete before stays.
        """
        self.join()
        # a name of its own: what a killed rank's writer still writes into an older partial folder never gets into this one
        partial = self.root / f"{PARTIAL}{step:06d}_{uuid.uuid4().hex[:8]}"
        with self._cleaning_up(partial):
            self.root.mkdir(exist_ok=True)  # not its parents: a run whose folder was deleted does not make it again
            for stale in self.root.glob(f"{PARTIAL}*"):
                shutil.rmtree(stale, ignore_errors=True)
            (partial / "trainer").mkdir(parents=True)
            (partial / STATE).write_text(json.dumps({**state, "step": step}, indent=1))
            write(partial)
            self._pending = step, partial, self._begin(partial / "trainer")
        self.poll()

    def poll(self) -> None:
        """Publish what is complete by now."""
        if self._pending is not None and self._pending[2].finished():
            self.join()

    def join(self) -> None:
        """Wait for what is being written, and publish it."""
        if self._pending is None:
            return
        step, partial, saving = self._pending
        self._pending = None
        target = self.root / f"step_{step:06d}"
        with self._cleaning_up(partial):
            saving.wait()
            _seal(partial)
            if target.exists():
                shutil.rmtree(target)
            storage.publish(partial, target, durable=True)
        for old in complete(self.run_dir)[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def _cleaning_up(self, partial: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _disk_error(error, self.root) from error


def save(run_dir: Path, step: int, state: dict[str, Any], write: Callable[[Path], None], keep: int) -> Path:
    """Checkpoint `step` through `write(folder)`, complete when this returns."""

    def begin(folder: Path) -> Saving:
        write(folder)
        return Saved()

    Checkpoints(run_dir, begin, keep).save(step, state)
    return run_dir / "checkpoints" / f"step_{step:06d}"


def complete(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [path for path in _steps(run_dir) if (path / MANIFEST).is_file()]


def damaged(run_dir: Path) -> list[Path]:
    """Checkpoints that have lost their manifest."""
    return [path for path in _steps(run_dir) if not (path / MANIFEST).is_file()]


def step_of(folder: Path) -> int:
    """The steps that were done when the checkpoint was saved."""
    return int(folder.name.removeprefix("step_"))


def _steps(run_dir: Path) -> list[Path]:
    """Folders named as checkpoints are, by step; whatever else lies there is not ours."""
    found = [path for path in (run_dir / "checkpoints").glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def latest(run_dir: Path, warn: Callable[[str], None] | None = None) -> Path:
    """The newest checkpoint whose files match its manifest; `warn` (or stderr) hears of newer ones that do not. UserError when
    there is none."""
    broken = dict.fromkeys(damaged(run_dir), f"{MANIFEST} is missing")
    intact = None
    for folder in reversed(complete(run_dir)):
        problems = verify(folder)
        if not problems:
            intact = folder
            break
        broken[folder] = problems[0]
    newer = [folder for folder in sorted(broken, key=step_of) if intact is None or step_of(folder) > step_of(intact)]
    listed = "; ".join(f"{folder.name}: {broken[folder]}" for folder in newer)
    if intact is None:
        raise UserError(
            f"{run_dir} has no complete checkpoint{f'; found only damaged ones ({listed})' if listed else ''}",
            key="resume",
            fix="start the run again without resume=, under another run_name",
        )
    if listed:
        text = f"{run_dir}: damaged checkpoints are passed over ({listed}); {intact.name} is the newest intact one"
        (warn or _to_stderr)(text)
    return intact


def _to_stderr(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def set_aside(run_dir: Path, after: Path) -> None:
    """Rename what is newer than `after`, which `latest` found damaged: it must neither count among those that are kept nor be
    written over."""
    for folder in _steps(run_dir):
        if step_of(folder) > step_of(after):
            folder.rename(folder.with_name(f"{DAMAGED}{folder.name}_{uuid.uuid4().hex[:8]}"))


def verify(folder: Path) -> list[str]:
    """Names every file that is missing or differs from the manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        wanted = {str(name): (int(entry["bytes"]), str(entry["xxh3_64"])) for name, entry in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return [f"{MANIFEST} is damaged"]
    if STATE not in wanted:
        return [f"{MANIFEST} is damaged: it does not name {STATE}"]
    problems = []
    for name, (size, digest) in wanted.items():
        path = folder / name
        try:
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != size:
                problems.append(f"{name} has {path.stat().st_size} bytes, not {size}")
            elif _digest(path) != digest:
                problems.append(f"{name} differs from its digest")
        except (OSError, ValueError) as error:
            problems.append(f"{name} cannot be read: {error}")
    return problems


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state stored beside the trainer's files."""
    return json.loads((folder / STATE).read_text())


def _seal(folder: Path) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "xxh3_64": _digest(path)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _disk_error(error: OSError, root: Path) -> Failure:
    kept = complete(root.parent)
    still = f"the last complete checkpoint is {kept[-1].name}" if kept else "there is no earlier checkpoint"
    if error.errno == errno.ENOSPC:
        return Failure(f"the disk is full while saving a checkpoint under {root}; {still}", fix="free space")
    return Failure(
        f"cannot save a checkpoint under {root}: {error.strerror or error}; {still}",
        fix="make outputs_dir writable, or set another",
    )
