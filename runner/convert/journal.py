"""The unfinished target: a folder `<target>.partial` with a journal of finished shards, published by one rename.

A kill at any moment leaves either the partial folder, which has no config.json that a loader would accept until its last
shard is on the disk, or the complete target. Starting the same conversion again continues it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from runner import storage
from runner.errors import UserError

JOURNAL = ".convert.jsonl"


class Partial:
    """Holds the partial folder of one conversion, locked against a second process. Use as a context manager.

    `identity`: everything that the bytes of the target depend on; a journal with another identity is refused.
    """

    def __init__(self, target: Path, identity: dict[str, Any]) -> None:
        self.target = target
        self.folder = target.with_name(target.name + ".partial")
        self.identity = json.loads(json.dumps(identity, sort_keys=True))
        self._journal: int | None = None

    def __enter__(self) -> Partial:
        if self.target.is_symlink() or self.folder.is_symlink():
            link = self.target if self.target.is_symlink() else self.folder
            raise UserError(f"{link} is a link", key="convert.target", fix="give another target, or remove it")
        if self.target.exists() and not (self.target.is_dir() and not any(self.target.iterdir())):
            raise UserError(f"{self.target} exists already", key="convert.target", fix="give another target, or remove it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._refuse_links()
            self._journal = os.open(self.folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}", key="convert.target") from None
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._journal)
            self._journal = None
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    def _refuse_links(self) -> None:
        """What this program writes into the folder has none; through one, a file somewhere else would be overwritten."""
        links = [path for path in self.folder.rglob("*") if path.is_symlink()]
        if links:
            raise UserError(f"{links[0]} is a link", key="convert.target", fix=f"remove {self.folder} to start over")

    def _lock(self) -> None:
        assert self._journal is not None
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is converting into {self.target} now", key="convert.target") from None

    def _read(self) -> None:
        lines = (self.folder / JOURNAL).read_text().splitlines()
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:  # the line that was being written at the kill
                break
        self.done: dict[str, int] = {}
        if not entries:
            self._append({"identity": self.identity})
            return
        if entries[0].get("identity") != self.identity and len(entries) == 1:  # no shard was finished: nothing is lost
            assert self._journal is not None
            os.ftruncate(self._journal, 0)
            self._append({"identity": self.identity})
            return
        if entries[0].get("identity") != self.identity:
            raise UserError(
                f"{self.folder} is the rest of another conversion (other source files, format or roles)",
                key="convert.target",
                fix=f"remove {self.folder} to start over",
            )
        for entry in entries[1:]:
            path = self.folder / entry["shard"]
            if path.is_file() and path.stat().st_size == entry["bytes"]:
                self.done[entry["shard"]] = entry["bytes"]

    def finish(self, shard: str, num_bytes: int) -> None:
        """Record a shard that is complete and on the disk."""
        self._append({"shard": shard, "bytes": num_bytes})
        self.done[shard] = num_bytes

    def _append(self, entry: dict[str, Any]) -> None:
        assert self._journal is not None
        # a torn last line of an earlier process must not swallow this entry
        size = os.fstat(self._journal).st_size
        torn = size > 0 and os.pread(self._journal, 1, size - 1) != b"\n"
        os.write(self._journal, (("\n" if torn else "") + json.dumps(entry) + "\n").encode())
        os.fsync(self._journal)

    def publish(self) -> None:
        """Make the folder the target, in one rename; the journal goes last, so a kill before it loses nothing."""
        storage.publish(self.folder, self.target, durable=True)
        (self.target / JOURNAL).unlink()


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError if the file system of `folder` (or of its nearest existing parent) has less than `needed` bytes."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the target needs {needed / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free",
            key="convert.target",
            fix="free some space, or give a target on another disk",
        )
