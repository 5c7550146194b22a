"""One kernel lock per folder that a process writes into: a run's, a sweep's, a scratch folder's.

The lock ends with its process, however that one ends, and no child keeps it: descriptors are closed in programs that are
started (close-on-exec) and in processes that are forked. The lock file stays in the folder and says that runner made it; while
the lock is held it names the process and its host, because process ids mean nothing on another machine or in a container.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

NAME = ".runner.lock"
PATIENCE_SECONDS = 1.0  # for a holder that only looks, see `holder`
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_open: set[int] = set()  # descriptors of this process's locks


@dataclass(frozen=True)
class Holder:
    """The process that has a lock, as it introduced itself; fields are None in the moment before it has."""

    pid: int | None = None
    host: str | None = None
    since: float | None = None  # unix time

    def __str__(self) -> str:
        if self.pid is None:
            return "another process"
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since)) if self.since else "an unknown time"
        return f"process {self.pid} on host {self.host} since {started}"


class Held(Exception):
    """A living process has the lock."""

    def __init__(self, by: Holder) -> None:
        super().__init__(str(by))
        self.by = by


class Lock:
    """The lock of a folder, held until `release` or the end of this process. Raises Held, and OSError for a folder that cannot
    be written."""

    def __init__(self, folder: Path, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.path = folder / NAME
        # open for reading: a file system with a file that is open for writing could not be turned read-only
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._acquire(patience_seconds)
            self._write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}))
        except BaseException:
            os.close(self._descriptor)
            raise
        _open.add(self._descriptor)

    def _acquire(self, patience_seconds: float) -> None:
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Held(_introduction(self._descriptor)) from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno == errno.EBADF:  # NFS wants the file open for writing
                    os.close(self._descriptor)
                    self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                    continue
                if error.errno not in _NO_LOCKS:
                    raise
                print(f"warning: {self.path.parent}: this file system has no locks ({error.strerror}); "
                      "nothing keeps a second process out of the folder", file=sys.stderr)  # fmt: skip
                return

    def _write(self, text: str) -> None:
        if self.in_place():
            self.path.write_text(text)

    def in_place(self) -> bool:
        """Whether the folder still has this very lock file: not after it was deleted, or deleted and made again."""
        try:
            there, mine = self.path.stat(), os.fstat(self._descriptor)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def release(self) -> None:
        """Safe to call again. The file stays: removing it would give the next two processes different locks."""
        if self._descriptor in _open:
            _open.discard(self._descriptor)
            with contextlib.suppress(OSError):
                self._write("")
            os.close(self._descriptor)


def holder(folder: Path) -> Holder | None:
    """Who has the folder's lock; None when nobody does, or there is none. Takes nothing: a shared lock, for a moment."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _introduction(descriptor)
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)
    return None


def _introduction(descriptor: int) -> Holder:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return Holder(int(found["pid"]), str(found["host"]), float(found["since"]))
    except (OSError, ValueError, TypeError, KeyError):
        return Holder()


def _close_in_child() -> None:
    for descriptor in _open:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _open.clear()


os.register_at_fork(after_in_child=_close_in_child)
