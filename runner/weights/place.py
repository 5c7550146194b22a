"""Where sets of weights lie on a machine. Imports no torch: the agents of a cluster's nodes start in a moment."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from runner import scratch

PREFIX = "runner-weights-"
ROOT = "RUNNER_NODE_WEIGHTS"  # environment variable: the folder of this node in which published sets lie


def shared_memory_folder(needed_bytes: int) -> Path:
    """A new folder of this user alone in shared memory, or in the temporary folder where that is too small."""
    shared = Path("/dev/shm")
    root: str | None = None
    if shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 3 * needed_bytes:
        root = str(shared)
    return scratch.make(PREFIX, Path(root or tempfile.gettempdir()))
