"""Temporary folders that do not outlive their process, however it ends.

A folder is removed by `remove`, or at the end of this process: by a guard, a shell that waits for the end of its stdin, which
only this process holds open. Where guard and process are killed together (a container that is stopped, a power cut) the next
process that makes a folder of the same prefix removes what was left; it knows by the lock in the folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from runner.lock import Held, Lock

# The folder's own processes die in the same moment and may still write: hence the repetition.
_GUARD = 'read -r _; for _ in 1 2 3 4 5 6 7 8 9 10; do rm -rf -- "$1" && [ ! -e "$1" ] && exit; sleep 1; done'
_MAX_SOCKET_FOLDER = 60  # characters; a socket's path has at most 107, and multiprocessing adds up to 40

_made: dict[Path, tuple[Lock, subprocess.Popen[bytes]]] = {}


def make(prefix: str, root: Path | None = None) -> Path:
    """A new folder of this user alone, in `root` or the temporary folder, locked as long as this process lives."""
    parent = root or Path(tempfile.gettempdir())
    remove_abandoned(parent, prefix)
    lock: Lock | None = None
    while lock is None:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)).absolute()
        with contextlib.suppress(FileNotFoundError, Held):  # taken for abandoned by another process, before it was locked
            lock = Lock(path)
            lock = lock if lock.in_place() else None
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "sh", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # a terminal's Ctrl-C and a scheduler's SIGTERM reach the whole group
    )
    _made[path] = lock, guard
    return path


def remove(path: Path) -> None:
    """Remove a folder, made here or not. Safe to call again."""
    shutil.rmtree(path, ignore_errors=True)
    lock, guard = _made.pop(path.absolute(), (None, None))
    if lock is not None:
        lock.release()
    if guard is not None and guard.stdin is not None:
        with contextlib.suppress(OSError):
            guard.stdin.close()
        guard.wait()


def environment(path: Path) -> dict[str, str]:
    """What makes the temporary files and sockets of another program land in `path`, which must be short enough for a socket; what
    torch compiles stays where other runs find it."""
    if len(str(path)) > _MAX_SOCKET_FOLDER:
        return {}
    variables = {"TMPDIR": str(path)}
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        with contextlib.suppress(KeyError, OSError):  # a user without a name
            import getpass

            variables["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}")
    return variables


def remove_abandoned(root: Path, prefix: str) -> None:
    """Folders of processes that were killed. Process ids would not do: shared memory may be shared with containers whose
    processes are not to be seen."""
    for folder in root.glob(f"{prefix}*"):
        with contextlib.suppress(OSError, Held):  # somebody else's, removed by now, or in use
            if folder.stat().st_uid == os.getuid():
                lock = Lock(folder, patience_seconds=0.0)
                shutil.rmtree(folder, ignore_errors=True)
                lock.release()
