"""What `make setup-gpu` needs of this machine, said before anything is downloaded. Any Python 3 runs it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

PYTHON = (3, 12)
GLIBC = (2, 34)
DISK_GIB = 30


def lacking() -> list[str]:
    problems = []
    if sys.version_info[:2] != PYTHON:
        problems.append(f"the lock is for Python 3.12, this is {platform.python_version()}: make setup-gpu PYTHON=python3.12")
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        problems.append(f"its wheels are for Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    name, version = platform.libc_ver()
    if name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) < GLIBC:
        problems.append(f"SGLang's wheels need glibc 2.34 (Ubuntu 22.04, Debian 12), this is {version}")
    if shutil.which("nvcc") is None and not Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc").is_file():
        problems.append(
            "no nvcc (it compiles Transformer Engine and INT4 kernels): install the CUDA 13 toolkit, or set CUDA_HOME"
        )
    if shutil.which("g++") is None:
        problems.append("no g++: apt-get install g++")
    free = shutil.disk_usage(Path.cwd()).free / 1024**3
    if free < DISK_GIB:
        problems.append(f"{free:.0f} GiB free here, {DISK_GIB} are needed")
    return problems


def main() -> int:
    problems = lacking()
    for problem in problems:
        print(f"setup-gpu: {problem}", file=sys.stderr)
    if problems:
        return 2
    print(
        "setup-gpu: 254 packages, 4.8 GB to download, 11 GB in .venv; then Transformer Engine is compiled (minutes)",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
