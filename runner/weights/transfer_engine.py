"""Mooncake's TransferEngine: one-sided reads of another process's memory, over RDMA or TCP. Imports no torch.

Mooncake has no keys and listens on every interface, whatever its address is: whoever reaches it can read and write what is
registered, and nothing else. So memory is registered only as long as it is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DEVICES = Path("/sys/class/infiniband")


class TransferError(RuntimeError):
    """Bytes did not come, or memory could not be registered."""


def obstacles(protocol: str) -> list[str]:
    """What this machine lacks for an `Endpoint`."""
    found = []
    if protocol == "rdma" and not (DEVICES.is_dir() and any(DEVICES.iterdir())):
        found.append("this machine has no RDMA device")
    if importlib.util.find_spec("mooncake") is None:
        found.append("mooncake-transfer-engine is not installed")
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        found.append("libibverbs.so.1 is missing, which Mooncake needs (Debian's package libibverbs1)")
    return found


class Endpoint:
    """This process's TransferEngine, as lender or as reader. Reads from any number of threads."""

    def __init__(self, host: str, protocol: str, devices: Sequence[str] = (), log: Path | None = None) -> None:
        """`host`: the own address that others meet us at; `devices`: RDMA devices (mlx5_0, ..), all by default; `log`: where
        the library writes while it starts, instead of stderr. TransferError where it does not start, or not on RDMA."""
        if missing := obstacles(protocol):
            raise TransferError("; ".join(missing))
        # Read once, when the library is loaded. It takes TCP by itself where it finds no device, and RDMA where it finds one.
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        os.environ.pop("MC_FORCE_TCP", None)
        if protocol == "tcp":
            os.environ["MC_FORCE_TCP"] = "1"
        with _stderr_to(log):
            from mooncake.engine import TransferEngine

            self._engine: Any = TransferEngine()
            if self._engine.initialize(host, "P2PHANDSHAKE", protocol, ",".join(devices)):
                raise TransferError(f"Mooncake's TransferEngine does not start on {host} ({protocol})")
            if protocol == "rdma" and not _has_rdma(self._engine.get_local_topology()):
                raise TransferError(f"Mooncake finds no RDMA device{f' among {devices}' if devices else ''}")
        self.protocol, self.devices = protocol, list(devices)
        self.session = f"{host}:{self._engine.get_rpc_port()}"

    @contextlib.contextmanager
    def registered(self, address: int, size: int) -> Iterator[None]:
        """Memory that reads may come out of, or go into, as long as the context lasts."""
        if code := self._engine.register_memory(address, size):
            raise TransferError(f"{size} bytes of memory cannot be registered for {self.protocol} (Mooncake's error {code})")
        try:
            yield
        finally:
            self._engine.unregister_memory(address)

    def read(self, session: str, ranges: Sequence[tuple[int, int]], into: int) -> None:
        """Copy (address, size) ranges of another process, one after the other, to registered memory at `into`. Blocks."""
        if not ranges:
            return
        own = [into]
        for _, size in ranges[:-1]:
            own.append(own[-1] + size)
        theirs, sizes = zip(*ranges, strict=True)
        if code := self._engine.batch_transfer_sync_read(session, own, list(theirs), list(sizes)):
            size = sum(sizes)
            raise TransferError(f"{size} bytes of {session} could not be read over {self.protocol} (Mooncake's error {code})")


def _has_rdma(topology: str) -> bool:
    """Mooncake's topology: location -> [preferred devices, other devices]."""
    return any(devices for lists in json.loads(topology).values() for devices in lists)


@contextlib.contextmanager
def _stderr_to(log: Path | None) -> Iterator[None]:
    """The library writes to file descriptor 2 whatever it is told; on a terminal with a live table that is noise."""
    if log is None:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(target, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(target)
