"""Which version and commit of runner this is: told by `--version` and environment.json. Torch-free."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
RECORD = "commit.json"  # written into a wheel where it is built (hatch_build.py); a checkout has none


def git_state(folder: Path) -> dict[str, Any] | None:
    """{"commit": 40 hex digits, "dirty": whether tracked files differ from it} of the repository whose top is `folder`; None
    where it is no such top, or without git. A repository around `folder` is somebody else's."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def commit(package: Path = PACKAGE) -> dict[str, Any] | None:
    """As `git_state`: of the checkout that `package` lies in, else as its wheel has written it down; None: unknown."""
    record = package / RECORD
    if not record.is_file():
        return git_state(package.parent)
    found = json.loads(record.read_text())
    assert isinstance(found, dict)
    return found


def version_line() -> str:
    """`runner 0.1.0, commit 6472d9e...`; says where files differ from that commit, and where none is known."""
    from runner import __version__  # not at the top: a build reads this file before runner is there

    found = commit()
    if found is None:
        return f"runner {__version__}, commit unknown"
    return f"runner {__version__}, commit {found['commit']}" + (", with changes" if found["dirty"] else "")
