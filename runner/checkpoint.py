"""Checkpoints of a run: written beside, checked, renamed; a kill at any moment leaves the last complete one loadable.

    checkpoints/step_000040/{manifest.json, state.json, trainer/...}

The manifest holds every file's size and xxh3-64 digest, and is written last. A folder without a manifest, or with a
leading dot, is never read.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from runner.errors import UserError
from runner.trainer.protocol import Saved, Saving

MANIFEST = "manifest.json"
PARTIAL = ".partial_"


class Checkpoints:
    """Writes a run's checkpoints through `begin(folder)`, which may go on writing while the run does; keeps the newest `keep`.

    A checkpoint is published, with its manifest, when all of it is on disk: at once, at a later `poll`, or at `join`.
    """

    def __init__(self, run_dir: Path, begin: Callable[[Path], Saving], keep: int) -> None:
        self.run_dir, self.root, self.keep = run_dir, run_dir / "checkpoints", keep
        self._begin = begin
        self._pending: tuple[int, Path, Saving] | None = None  # step, partial folder, what is being written into it

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin checkpoint `step`, after the one before it is complete.

        Raises UserError when the disk is full or read-only; what was complete before stays.
        """
        self.join()
        # a name of its own: what a killed rank's writer still writes into an older partial folder never gets into this one
        partial = self.root / f"{PARTIAL}{step:06d}_{uuid.uuid4().hex[:8]}"
        with self._cleaning_up(partial):
            self.root.mkdir(parents=True, exist_ok=True)
            for stale in self.root.glob(f"{PARTIAL}*"):
                shutil.rmtree(stale, ignore_errors=True)
            (partial / "trainer").mkdir(parents=True)
            (partial / "state.json").write_text(json.dumps({**state, "step": step}, indent=1))
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
            partial.rename(target)
            sync_to_disk(self.root)
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
    return sorted(path for path in (run_dir / "checkpoints").glob("step_*") if (path / MANIFEST).is_file())


def latest(run_dir: Path) -> Path:
    """The newest checkpoint whose files match its manifest; raises UserError when there is none."""
    broken = []
    for folder in reversed(complete(run_dir)):
        problems = verify(folder)
        if not problems:
            return folder
        broken.append(f"{folder.name}: {problems[0]}")
    found = f"; found only damaged ones ({'; '.join(broken)})" if broken else ""
    raise UserError(
        f"{run_dir} has no complete checkpoint{found}",
        key="resume",
        fix="start the run again without resume=, under another run_name",
    )


def verify(folder: Path) -> list[str]:
    """Names every file that is missing or differs from the manifest."""
    problems = []
    for name, entry in json.loads((folder / MANIFEST).read_text())["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}")
        elif _digest(path) != entry["xxh3_64"]:
            problems.append(f"{name} differs from its digest")
    return problems


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state stored beside the trainer's files."""
    return json.loads((folder / "state.json").read_text())


def _seal(folder: Path) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "xxh3_64": _digest(path)}
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    with (folder / MANIFEST).open("w") as handle:
        json.dump({"files": files}, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sync_to_disk(path: Path) -> None:
    """Flush a file, or a folder's list of files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_error(error: OSError, root: Path) -> UserError:
    kept = complete(root.parent)
    still = f"the last complete checkpoint is {kept[-1].name}" if kept else "there is no earlier checkpoint"
    if error.errno == errno.ENOSPC:
        return UserError(
            f"the disk is full while saving a checkpoint under {root}; {still}", fix="free space, then resume=<this run>"
        )
    return UserError(
        f"cannot save a checkpoint under {root}: {error.strerror}; {still}", fix="make outputs_dir writable, or set another"
    )
