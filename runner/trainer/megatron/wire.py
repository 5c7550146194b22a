"""Messages between the driver and its own rank processes, over a socket pair that nobody else holds.

Tensors travel as raw bytes beside a pickled frame: plain pickling of a tensor writes an archive for each, which takes longer
than computing on small ones.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
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
    def __init__(self, buffer: io.BytesIO, beside: list[Any] | None, kind: type | None) -> None:
        super().__init__(buffer, protocol=5)
        self._beside, self._kind = beside, kind

    def persistent_id(self, obj: Any) -> int | None:
        """A reference that must not travel as bytes goes into the list beside them."""
        if self._beside is None or self._kind is None or not isinstance(obj, self._kind):
            return None
        self._beside.append(obj)
        return len(self._beside) - 1

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        host = obj.detach().cpu().contiguous()
        data = host.reshape(-1).view(_AS_BYTES).numpy().tobytes() if host.numel() else b""
        return _rebuild, (data, host.dtype, tuple(host.shape))


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: Any, beside: Sequence[Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._beside = beside

    def persistent_load(self, index: Any) -> Any:
        return self._beside[index]


def dumps(message: Any, beside: list[Any] | None = None, kind: type | None = None) -> bytes:
    """`beside`: takes the objects of `kind`, in whose place the bytes hold numbers."""
    buffer = io.BytesIO()
    _Pickler(buffer, beside, kind).dump(message)
    return buffer.getvalue()


def loads(data: Any, beside: Sequence[Any] = ()) -> Any:
    """Inverse of `dumps`, of any buffer."""
    return _Unpickler(data, beside).load() if beside else pickle.loads(data)


def send(connection: Connection, message: Any) -> None:
    connection.send_bytes(dumps(message))


def receive(connection: Connection) -> Any:
    """EOFError when the other side is gone. Both sides are this program's own processes."""
    return pickle.loads(connection.recv_bytes())
