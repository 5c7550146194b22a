"""Messages between the driver and its own rank processes, over a socket pair that nobody else holds.

Tensors travel as raw bytes beside a pickled frame: plain pickling of a tensor writes an archive for each, which takes longer
than computing on small ones.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

_AS_BYTES = torch.uint8


@dataclass(frozen=True)
class Failure:
    """Why a rank's call failed. `fix` and `key` of a UserError, which is no mistake of the user where `broke` says so;
    `traceback` of anything else."""

    problem: str
    fix: str | None
    key: str | None
    traceback: str | None
    broke: bool = False


def _rebuild(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        host = obj.detach().cpu().contiguous()
        data = host.reshape(-1).view(_AS_BYTES).numpy().tobytes() if host.numel() else b""
        return _rebuild, (data, host.dtype, tuple(host.shape))


def dumps(message: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(message)
    return buffer.getvalue()


def send(connection: Connection, message: Any) -> None:
    connection.send_bytes(dumps(message))


def receive(connection: Connection) -> Any:
    """EOFError when the other side is gone. Both sides are this program's own processes."""
    return pickle.loads(connection.recv_bytes())
