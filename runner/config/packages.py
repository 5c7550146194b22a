"""What is installed here against what is locked, and whether it loads. Imports no torch: other processes do that."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runner.config.searchpath import HOME

LOCK_CPU, LOCK_GPU = "constraints.txt", "constraints-gpu.txt"  # in the checkout, and in the wheel beside conf/
LOAD_SECONDS = 300.0  # torch and Transformer Engine from a cold disk


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def version_of(distribution: str) -> str | None:
    """As installed, without a build's label (2.13.0+cpu is 2.13.0)."""
    try:
        return importlib.metadata.version(distribution).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def locked(file: str) -> dict[str, str]:
    """Distribution -> version of a lock; empty where there is none."""
    path = HOME / file
    lines = path.read_text().splitlines() if path.is_file() else []
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def from_lock(distribution: str, file: str) -> str:
    """`sglang-kernel 0.4.9, the lock has 0.4.10`; without the rest where they agree, or the lock does not name it."""
    found, wanted = version_of(distribution) or "not installed", locked(file).get(distribution)
    return f"{distribution} {found}" + (f", the lock has {wanted}" if wanted not in (None, found) else "")


def failures(modules: Iterable[str], seconds: float = LOAD_SECONDS) -> Iterator[tuple[str, str]]:
    """(module, last line of the error) of those that do not import; each in a process of its own, at the same time."""

    def load(module: str) -> str:
        command = [sys.executable, "-c", f"import {module}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return f"not imported within {seconds:.0f} s"
        if not done.returncode:
            return ""
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        told = [line for line in lines if "cannot open shared object" in line or "undefined symbol" in line]
        return (told or lines or [f"exit code {done.returncode}"])[-1]

    names = list(modules)
    with ThreadPoolExecutor(max(1, len(names))) as pool:
        for name, error in zip(names, pool.map(load, names), strict=True):
            if error:
                yield name, error


def tool(name: str) -> str | None:
    """Path of a program that kernels are compiled with: on PATH, in CUDA_HOME, or beside this Python."""
    folders = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin", Path(sys.executable).parent]
    return shutil.which(name) or next((str(folder / name) for folder in folders if os.access(folder / name, os.X_OK)), None)
