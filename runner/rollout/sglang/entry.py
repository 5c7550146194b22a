"""The process of one SGLang server: `python -m runner.rollout.sglang.entry`, started by server.py and by nobody else.

Reads one line of JSON from stdin: {"server_args": {...}, "api_key": "...", "parent": pid}. The key travels there because
arguments and environments of a process can be read by others and end up in logs. stdin then stays open: its end is the
end of the driver, however it died, and takes this process and its children along.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from typing import Any

PR_SET_PDEATHSIG = 1
VERSION = "0.5.23"  # the plugin hooks private functions of exactly this version


def main() -> int:
    line = sys.stdin.readline()
    if not line:
        return 1
    asked: dict[str, Any] = json.loads(line)
    _die_with(asked["parent"])
    threading.Thread(target=_wait_for_end_of_driver, daemon=True).start()
    import sglang

    if sglang.__version__ != VERSION:
        print(f"error: SGLang {VERSION} is needed, {sglang.__version__} is installed: make setup-sglang", file=sys.stderr)
        return 1
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    from runner.rollout.sglang import plugin

    if not plugin.registered:
        print("error: SGLang did not load runner's plugin: make setup-sglang installs its entry point", file=sys.stderr)
        return 1
    try:
        run_server(ServerArgs(**asked["server_args"], api_key=asked["api_key"]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
    return 0


def _die_with(parent: int) -> None:
    """SIGKILL when the driver's thread that started us ends; the kernel sees to it even if no Python code runs any more."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        sys.exit(1)


def _wait_for_end_of_driver() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)  # server.py starts us in a session of our own: our children are all of the group


if __name__ == "__main__":
    sys.exit(main())
