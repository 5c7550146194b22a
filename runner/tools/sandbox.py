"""Python code of a model in a process of its own.

What it guards against: the network (no sockets at all), endless computing (CPU and wall time), memory, large files, floods of
output, children that outlive the call (they cannot leave its process group, which is killed), and the run's environment
variables. It is in an empty folder that is removed afterwards.

What it does not guard against: the code runs as the user of the run, and reads, and outside of its folder writes, what that user
may; it sees the machine's processes, and a fault of the kernel is no obstacle. Code that is out to do harm belongs into a
container or a virtual machine of its own: run the whole program in one.
"""

from __future__ import annotations

import contextlib
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from runner.errors import UserError
from runner.tools.protocol import ToolError

CHILD = Path(__file__).with_name("sandbox_child.py")
MAX_CODE_CHARACTERS = 100_000


class PythonSandbox:
    name = "python"
    description = "Runs Python code and returns what it prints. The standard library is there; the network is not."
    parameters: dict[str, dict[str, Any]] = {"code": {"type": "string"}}

    def __init__(self, seconds: float = 10.0, memory_mib: int = 512, output_characters: int = 4000) -> None:
        """UserError on a machine whose kernel cannot shut out the network this way."""
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
            raise UserError(
                "the Python sandbox needs Linux on x86_64 or aarch64", key="task.rollout.arguments", fix="other tools"
            )
        self.seconds, self.memory_mib, self.output = seconds, memory_mib, output_characters

    def call(self, **arguments: Any) -> str:
        """What the code printed, errors included, cut to `output_characters`. ToolError where it ran out of time."""
        code = arguments["code"]
        if not isinstance(code, str) or len(code) > MAX_CODE_CHARACTERS:
            raise ToolError("the code is no text, or too long")
        folder = tempfile.mkdtemp(prefix="runner-sandbox-")
        limits = [str(self.memory_mib << 20), str(int(self.seconds) + 1)]
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(CHILD), *limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": folder, "LANG": "C.UTF-8"},
                start_new_session=True,
            )
            try:
                printed, late = self._talk(process, code.encode("utf-8", "replace"))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        text = printed.decode("utf-8", "replace")
        if late:
            raise ToolError(f"the code did not end within {self.seconds:g} s")
        return text if len(text) <= self.output else text[: self.output] + "\n[cut]"

    def _talk(self, process: subprocess.Popen[bytes], code: bytes) -> tuple[bytes, bool]:
        """(what it printed, as far as anyone reads it; whether its time was over)."""
        assert process.stdin and process.stdout
        deadline, printed = time.monotonic() + self.seconds, b""
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(code)
        with process.stdout, selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(printed) <= 4 * self.output:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return printed, True
                piece = os.read(process.stdout.fileno(), 65536)
                if not piece:
                    break
                printed += piece
        return printed, False
