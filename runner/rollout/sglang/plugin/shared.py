"""Names of what the processes of one server share in memory, so that it can be removed when they were killed."""

from __future__ import annotations

from pathlib import Path

SHARED = Path("/dev/shm")


def shared_file(group: int, name: str) -> Path:
    """Where SGLang keeps the load figures of a server. Its own names say nothing about who made them, so that files of killed
    servers could never be told from those of living ones."""
    return SHARED / f"sglang_loads_{group}_{name}.shm"


def shared_segment(kind: str, group: int, rest: str) -> str:
    """Name of a segment through which the processes of a server talk; `rest` is SGLang's own end of it."""
    return f"sgl_shm_{kind}_g{group}_{rest}"


def remove_shared_files(group: int) -> None:
    """Of a server that was killed; SGLang removes nothing then. `group`: its process group."""
    for name in (shared_file(group, "*").name, shared_segment("*", group, "*")):
        for path in SHARED.glob(name):
            path.unlink(missing_ok=True)
