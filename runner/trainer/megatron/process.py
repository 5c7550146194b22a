"""The process of one rank, started by ranks.py with one end of a socket pair.

On GPUs it is `python -m runner.trainer.megatron.process FD`; on a CPU forkserver.py forks it. It serves calls until the other end
closes. Checkpointing spawns helpers that import this module again, hence the guard.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from runner.errors import Failure, UserError
from runner.trainer.megatron import wire

PART_BYTES = 64 << 20  # tensors of a stream that travel in one message
_PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> int:
    """Serve one driver; returns when it closes the connection."""
    die_with_parent()
    os.register_at_fork(after_in_child=die_with_parent)  # checkpoint writers, and theirs: without it they wait for a dead rank
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # where a silent rank stands, into its log
    ignore_signals()
    warnings.filterwarnings("ignore")
    connection = Connection(descriptor)
    try:
        worker = _start(connection)
        while worker is not None:
            name, arguments = wire.receive(connection)
            if not _serve(connection, worker, name, arguments):
                return 1
    except EOFError:
        return 0
    return 1


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that one ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def ignore_signals() -> None:
    """Leave Ctrl-C and SIGTERM to the driver: it finishes the step, saves, and closes us."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def preload() -> None:
    """Import everything that a rank needs."""
    sys.modules["wandb"] = None  # type: ignore[assignment]  # Megatron imports it where it can; only the driver logs
    from runner.trainer.megatron import cpu_shim, worker  # noqa: F401


def leave(code: int) -> NoReturn:
    """End this process without destructors of process groups whose other members may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start(connection: Connection) -> Any:
    """Build the worker from the first message; None when that failed (the driver has been told)."""
    cfg, rank, rendezvous, local_rank = wire.receive(connection)
    try:
        preload()
        from runner.trainer.megatron import worker

        worker.initialize(cfg, rank, rendezvous, local_rank)
        built = worker.Worker(cfg)
    except Exception as error:
        wire.send(connection, failure(error))
        return None
    wire.send(connection, None)
    return built


def _serve(connection: Connection, worker: Any, name: str, arguments: tuple[Any, ...]) -> bool:
    """One call; a generator's items come in parts, then the result. False after a failure: the ranks no longer agree."""
    result = run(worker, name, arguments)
    if isinstance(result, Iterator):
        for part in parts(result):
            wire.send(connection, part)
            if isinstance(part, wire.Failure):
                return False
        result = None
    wire.send(connection, result)
    return not isinstance(result, wire.Failure)


def run(worker: Any, name: str, arguments: tuple[Any, ...]) -> Any:
    """What the worker answers to one call, or the wire.Failure that it ended with."""
    try:
        return getattr(worker, name)(*arguments)
    except BaseException as error:  # torch's CheckpointException is no Exception
        return failure(error)


def parts(items: Iterator[Any]) -> Iterator[Any]:
    """Lists of items with up to PART_BYTES of tensors; a wire.Failure where the generator fails."""
    part: list[Any] = []
    size = 0
    while True:
        try:
            item = next(items, None)
        except BaseException as error:
            yield failure(error)
            return
        if item is None:
            break
        part.append(item)
        size += sum(tensor.numel() * tensor.element_size() for tensor in item.parts.values())
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def failure(error: BaseException) -> wire.Failure:
    """What the driver is told of an error."""
    if isinstance(error, UserError):
        return wire.Failure(error.problem, error.fix, error.key, None, isinstance(error, Failure))
    return wire.Failure(f"{type(error).__name__}: {error}", None, None, traceback.format_exc())


if __name__ == "__main__":
    leave(main(int(sys.argv[1])))
