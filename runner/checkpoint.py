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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from runner.errors import UserError

MANIFEST = "manifest.json"


def save(run_dir: Path, step: int, state: dict[str, Any], write: Callable[[Path], None], keep: int) -> Path:
    """Write checkpoint `step` through `write(folder)`, then drop all but the newest `keep`.

    Raises UserError when the disk is full or read-only; what was complete before stays.
    """
    root = run_dir / "checkpoints"
    target = root / f"step_{step:06d}"
    partial = root / f".partial_{step:06d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "trainer").mkdir(parents=True)
        write(partial / "trainer")
        (partial / "state.json").write_text(json.dumps({**state, "step": step}, indent=1))
        _seal(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        sync_to_disk(root)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _disk_error(error, root) from error
    for old in complete(run_dir)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


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
