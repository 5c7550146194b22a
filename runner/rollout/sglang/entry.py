"""The process of one SGLang server: `python -m runner.rollout.sglang.entry`, started by server.py and by nobody else.

Reads one line of JSON from stdin: {"server_args": {...}, "api_key": "..."}. The key travels there because arguments and
environments of a process can be read by others and end up in logs. stdin then stays open: its end is the end of the driver,
however it died. A guard process waits for it and takes the whole process group along, the scheduler and detokenizer included:
those ask the kernel to end them with their parent, but only late in their own start.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from typing import Any

from runner.rollout.sglang.plugin.shared import remove_shared_files

GUARD_SECONDS = 0.3  # between looks at whether the server itself still lives
VERSION = "0.5.23"  # the plugin hooks private functions of exactly this version


def main() -> int:
    line = sys.stdin.readline()
    if not line:
        return 1
    asked: dict[str, Any] = json.loads(line)
    start_guard()
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
        print("error: SGLang did not load runner's plugin (above is why, or make setup-sglang installs it)", file=sys.stderr)
        return 1
    try:
        run_server(ServerArgs(**asked["server_args"], api_key=asked["api_key"]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
    return 0


def start_guard() -> None:
    """Fork, before anything large is imported, a process that kills our group when the driver or we end."""
    server = os.getpid()
    if os.fork():
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        return
    while os.getppid() == server:
        readable, _, _ = select.select([0], [], [], GUARD_SECONDS)
        if readable and not os.read(0, 4096):
            break
    remove_shared_files(os.getpgid(0))
    os.killpg(0, signal.SIGKILL)  # server.py started us in a session of our own


if __name__ == "__main__":
    sys.exit(main())
