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

import numpy as np
import torch

from runner.models.stacks import Place
from runner.weights.files import DTYPE_NAMES

ALIGNMENT = 8  # of the data section, as safetensors' own writer does


@dataclass(frozen=True)
class Part:
    """One tensor of an output file, or with a `place` a part of one that holds those of all experts."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    place: Place | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored_name(self) -> str:
        return self.name if self.place is None else self.place.name

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape if self.place is None else self.place.stored_shape(self.shape)


class ShardWriter:
    """Writes the `parts` of one file, in any order and from several threads; `close` checks that none is missing."""

    def __init__(self, path: Path, parts: list[Part]) -> None:
        self.path = path
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        positions: dict[str, int] = {}
        position = 0
        # widest dtype first, as safetensors' own writer does, so that every tensor is aligned
        for part in sorted(parts, key=lambda p: (-p.dtype.itemsize, p.stored_name)):
            if part.stored_name in positions:
                continue
            stop = position + math.prod(part.stored_shape) * part.dtype.itemsize
            header[part.stored_name] = {
                "dtype": DTYPE_NAMES[part.dtype],
                "shape": list(part.stored_shape),
                "data_offsets": [position, stop],
            }
            positions[part.stored_name] = position
            position = stop
        self._places = {part.name: (part, positions[part.stored_name]) for part in parts}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self._start = 8 + len(text)
        self.num_bytes = self._start + position
        self._pending = set(self._places)
        path.unlink(missing_ok=True)  # never into a file that something else may share, or through a link
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        os.ftruncate(self._file, self.num_bytes)
        if any(part.place for part in parts):  # which are written through a mapping, where a full disk would be a signal
            os.posix_fallocate(self._file, 0, self.num_bytes)
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
        if part.place is not None:
            self._write_into_stack(part, part.place, position, tensor.detach(), start)
        elif tensor.numel():
            row_bytes = math.prod(part.shape[1:]) * part.dtype.itemsize
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._write(data.data, self._start + position + start * row_bytes)
        if last:
            self._pending.discard(name)

    def _write_into_stack(self, part: Part, place: Place, position: int, tensor: torch.Tensor, start: int) -> None:
        """Rows of one expert's part, which do not lie side by side in the file."""
        shape = part.stored_shape[1:]
        size = math.prod(shape) * part.dtype.itemsize
        first = self._start + position + place.expert * size
        mapped = np.memmap(self.path, np.uint8, "r+", offset=first, shape=(size,))
        target = place.of(torch.from_numpy(mapped).view(part.dtype).view(shape))
        target[start : start + len(tensor)].copy_(tensor)

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
