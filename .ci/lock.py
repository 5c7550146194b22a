"""`make lock`: compile the versions that `make setup` and `make setup-gpu` install, from pyproject.toml, with uv.

    python .ci/lock.py                 # both files, keeping every version that still fits
    python .ci/lock.py --upgrade       # the newest versions that fit
    python .ci/lock.py --check         # exit 1 where a committed file is not what its inputs give; writes nothing

constraints.txt: CPUs, Python 3.11 (3.12 and 3.13 install the same versions). torch's CUDA libraries are left out: which build of
torch there is, `make setup` decides first. constraints-gpu.txt: CUDA 13 on x86-64 Linux, Python 3.12, everything.
Only names and versions are written, no address of an index.
"""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
CUDA = ("nvidia-", "cuda-")  # torch's own needs on Linux, which its CPU build does not have


@dataclass(frozen=True)
class Lock:
    file: str
    head: str
    inputs: tuple[str, ...]
    extras: tuple[str, ...]
    python: str
    platform: str
    fixed: tuple[str, ...] = ()  # constraints beside pyproject.toml's ranges
    overrides: tuple[str, ...] = ()  # what packages ask for and must not get
    leave_out: tuple[str, ...] = ()  # prefixes of names


LOCKS = (
    Lock(
        "constraints.txt",
        "# CPUs: made by `make lock`; `make setup` and `make setup-sglang` install these versions.",
        ("pyproject.toml", "runner/rollout/sglang/requirements.txt"),
        ("dev", "megatron", "tensorboard", "mlflow", "docs", "mcp"),
        "3.11",
        "x86_64-manylinux_2_34",
        fixed=("torch==2.13.0",),
        leave_out=CUDA,
    ),
    Lock(
        "constraints-gpu.txt",
        "# GPUs (CUDA 13, x86-64 Linux, Python 3.12): made by `make lock`; `make setup-gpu` and the Dockerfile install this.",
        ("pyproject.toml",),
        ("dev", "megatron", "tensorboard", "mlflow", "mcp", "gpu"),
        "3.12",
        "x86_64-manylinux_2_34",
        # transformer-engine-torch asks for the CUDA 12 core, whose files would overwrite those of the CUDA 13 core
        overrides=("transformer-engine-cu12; python_version < '3'",),
    ),
)


def compiled(lock: Lock, committed: str, upgrade: bool) -> str:
    """The text of the lock; versions of `committed` are kept where they still fit, unless `upgrade`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        output = folder / "lock.txt"
        output.write_text(committed)
        command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--no-header", "--no-annotate", "-o", str(output)]
        command += ["--python-version", lock.python, "--python-platform", lock.platform]
        for extra in lock.extras:
            command += ["--extra", extra]
        for option, lines in (("--constraint", lock.fixed), ("--override", lock.overrides)):
            if lines:
                (folder / option[2:]).write_text("\n".join(lines))
                command += [option, str(folder / option[2:])]
        if upgrade:
            command.append("--upgrade")
        done = subprocess.run([*command, *lock.inputs], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        lines = [line for line in output.read_text().splitlines() if not line.startswith(("#", "--", *lock.leave_out))]
    return "\n".join([lock.head, *lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description="compile the locks")
    parser.add_argument("--check", action="store_true", help="compare with the committed files")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    arguments = parser.parse_args()
    if find_spec("uv") is None:
        sys.exit("uv is not installed here: make setup")
    differs = False
    for lock in LOCKS:
        path = ROOT / lock.file
        committed = path.read_text() if path.is_file() else ""
        text = compiled(lock, committed, arguments.upgrade)
        if not arguments.check:
            path.write_text(text)
        elif text != committed:
            differs = True
            sys.stdout.writelines(difflib.unified_diff(committed.splitlines(True), text.splitlines(True), lock.file, "compiled"))
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
