"""Tests of Triton kernels: in Triton's interpreter on a CPU, for real wherever there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
runs_here = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="run below, in an interpreting process")
starts_it = pytest.mark.skipif(INTERPRETED, reason="this is the interpreting process")


def interpret(file: str) -> None:
    """Run the tests of `file` named kernel. Triton reads TRITON_INTERPRET when it is imported, so in a process of its own; it
    must have run every test."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file, "-k", "kernel"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout and "passed" in result.stdout
