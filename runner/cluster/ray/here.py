"""The process that holds Ray nodes of this machine: `python -m runner.cluster.ray.here FOLDER NODES CPU|GPU STORE_BYTES`.

In a session of its own: a SIGTERM that a scheduler sends to a whole process group must not take the nodes from under a run that
is saving. Says the cluster's address on stdout; a line on stdin asks for one node more; the end of stdin, which only the run
holds open, is the end of all nodes. Some of Ray's helpers outlive a killed raylet: what has this run's own folder in its
environment is ended then, and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from runner import scratch
from runner.weights.place import PREFIX

VARIABLE = "RAY_TMPDIR"
NODE_RESOURCE = "runner_node"  # of a node without GPUs: one
CORES = 4  # that a node says it has; nothing of ours asks for one
LEFT = {"/dev/shm": (PREFIX,), tempfile.gettempdir(): (PREFIX, "runner-node-")}
GRACE_SECONDS = 3.0  # in which Ray's own processes end by themselves


def processes_of(folder: str) -> list[int]:
    """Process ids with `folder` as their Ray folder, this one left out."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(VARIABLE) == folder:
                found.append(process.pid)
    return found


def end(folder: str) -> None:
    """Kill them, and remove the folder."""
    deadline = time.monotonic() + GRACE_SECONDS
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
    for place, prefixes in LEFT.items():  # of agents that were killed together with whoever removes it for them
        for prefix in prefixes:
            scratch.remove_abandoned(Path(place), prefix)


def main(folder: str, nodes: int, on_gpus: bool, store_bytes: int) -> int:
    """`store_bytes`: of each node's object store on a CPU; with GPUs the machine is the run's, and Ray takes its share of it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the run's end is what counts
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.ERROR)
    cluster: Any = Cluster()
    devices = {} if on_gpus else {"num_gpus": 0, "object_store_memory": store_bytes}

    def add() -> None:
        cluster.add_node(num_cpus=CORES, resources={NODE_RESOURCE: 1}, include_dashboard=False, **devices)
        print(cluster.address, flush=True)

    try:
        for _ in range(nodes):
            add()
        while sys.stdin.readline():
            add()
    finally:
        with contextlib.suppress(Exception):
            cluster.shutdown()
        end(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "GPU", int(sys.argv[4])))
