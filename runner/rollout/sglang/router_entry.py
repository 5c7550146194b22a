"""The process of sglang-router: `python -m runner.rollout.sglang.router_entry`, started by router.py and by nobody else.

Reads one line of JSON from stdin: {"router_args": {...}, "api_key": "..."}; see entry.py for why it comes that way, and for the
guard that ends this process with the driver.
"""

from __future__ import annotations

import json
import sys

from runner.rollout.sglang.entry import start_guard


def main() -> int:
    line = sys.stdin.readline()
    if not line:
        return 1
    asked = json.loads(line)
    start_guard()
    from sglang_router.launch_router import launch_router
    from sglang_router.router_args import RouterArgs

    launch_router(RouterArgs(**asked["router_args"], api_key=asked["api_key"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
