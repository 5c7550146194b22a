"""Writing so that a kill at any moment leaves the old state or the new one: files in one rename, folders in one rename.

Imports no torch. A folder that is still being filled has another name, which nobody reads, until `publish` gives it its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from runner.errors import Failure


def atomic_write(path: Path, text: str, *, durable: bool = False) -> None:
    """Write `text` so that a reader, or a kill at any moment, sees the old file or the new one and nothing between. `durable`:
    a power cut, too.

    Raises Failure where the file cannot be written (full disk, read-only folder).
    """
    temporary = _unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a read-only file system refuses this, too
            temporary.unlink(missing_ok=True)
        raise Failure(
            f"cannot write {path}: {error.strerror}", fix="free some space or set outputs_dir=<a writable folder>"
        ) from error


@contextlib.contextmanager
def new_folder(target: Path, *, durable: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends (see `publish`), and is removed when the block raises."""
    partial = _unfinished(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        publish(partial, target, durable=durable)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def publish(partial: Path, target: Path, *, durable: bool) -> None:
    """Rename a complete folder to its name beside it, which must be free (or an empty folder). `durable`: first everything in it,
    then the rename, reach the disk."""
    if durable:
        sync_tree(partial)
    partial.rename(target)
    if durable:
        sync_to_disk(target.parent)


def sync_tree(folder: Path) -> None:
    """Flush every file below `folder`, and all lists of files, to the disk."""
    for path in folder.rglob("*"):
        sync_to_disk(path)
    sync_to_disk(folder)


def sync_to_disk(path: Path) -> None:
    """Flush a file, or a folder's list of files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unfinished(target: Path) -> Path:
    """Hidden, beside its target, and of this process alone."""
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")
