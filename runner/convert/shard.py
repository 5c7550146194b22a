"""One safetensors file whose tensors are written in any order, by any thread, into places fixed beforehand.

The header comes first in a safetensors file, so all names, dtypes and shapes must be known before the first byte is
written. They are (see jobs.py), which is what lets the converter stream: nothing waits in memory for a shard to be full.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from runner.weights.files import DTYPE_NAMES

ALIGNMENT = 8  # of the data section, as safetensors' own writer does


@dataclass(frozen=True)
class Part:
    """One tensor of an output file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Writes the `parts` of one file, in any order and from several threads; `close` checks that none is missing."""

    def __init__(self, path: Path, parts: list[Part]) -> None:
        self.path = path
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[Part, int]] = {}
        position = 0
        # widest dtype first, as safetensors' own writer does, so that every tensor is aligned
        for part in sorted(parts, key=lambda p: (-p.dtype.itemsize, p.name)):
            stop = position + part.num_bytes
            header[part.name] = {
                "dtype": DTYPE_NAMES[part.dtype],
                "shape": list(part.shape),
                "data_offsets": [position, stop],
            }
            self._places[part.name] = (part, position)
            position = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self._start = 8 + len(text)
        self.num_bytes = self._start + position
        self._pending = set(self._places)
        path.unlink(missing_ok=True)  # never into a file that something else may share, or through a link
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        os.ftruncate(self._file, self.num_bytes)
        self._write(len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, tensor: torch.Tensor, first_row: int | None = None) -> None:
        """Put a tensor, or its rows from `first_row` on, in place; dtype and shape must be what was announced.

        Rows must reach the end of the tensor at some time, and then the tensor counts as written; the caller writes
        the earlier ones before.
        """
        part, position = self._places[name]
        start = 0 if first_row is None else first_row
        stop = tensor.shape[0] + start if tensor.dim() else 0
        fits = tensor.dtype == part.dtype and tuple(tensor.shape[1:]) == part.shape[1:] and tensor.dim() == len(part.shape)
        last = tensor.dim() == 0 or stop == part.shape[0]
        if not fits or (tensor.dim() > 0 and stop > part.shape[0]) or (first_row is None and not last):
            raise AssertionError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} where {part.dtype} {part.shape} was planned")
        if tensor.numel():
            row_bytes = math.prod(part.shape[1:]) * part.dtype.itemsize
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._write(data.data, self._start + position + start * row_bytes)
        if last:
            self._pending.discard(name)

    def _write(self, data: bytes | memoryview, position: int) -> None:
        view = memoryview(data)
        while len(view):  # one call writes at most 2 GiB
            written = os.pwrite(self._file, view[: 1 << 30], position)
            view, position = view[written:], position + written

    def close(self, *, complete: bool = True) -> None:
        """Flush to the disk and close; `complete=False` after a failure, when parts are missing."""
        try:
            if complete:
                if self._pending:
                    raise AssertionError(f"{self.path.name}: {len(self._pending)} tensors were never written")
                os.fsync(self._file)
        finally:
            os.close(self._file)
