"""Safetensors files beside what the library offers: errors that say what the operating system said, and where a tensor lies."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

# safetensors' own dtype names
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """`save_file` of contiguous CPU tensors. A full disk is an OSError with its errno, as from any other write:
    safetensors itself raises a SafetensorError that carries the number in its text."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


@dataclass(frozen=True)
class Span:
    """One tensor inside a file: `offset` and `size` in bytes."""

    dtype: torch.dtype
    shape: list[int]
    offset: int
    size: int


def spans(path: Path) -> dict[str, Span]:
    """Where every tensor lies. The format: 8 bytes with the length of a JSON header, the header, the tensors' bytes."""
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        found[name] = Span(DTYPES[entry["dtype"]], entry["shape"], 8 + length + start, stop - start)
    return found
