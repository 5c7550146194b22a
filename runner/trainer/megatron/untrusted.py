"""Megatron checkpoints from elsewhere: nothing in one of them is executed.

torch's distributed checkpoints keep their table of tensors, `.metadata`, as a pickle, and a pickle may call any function while
it is read. The same table may declare a tensor to be an object, which torch then unpickles without restriction. Here both are
closed: the table is read by an unpickler that knows the dozen classes in question, holds tensors only, and names files of its
own folder only. Megatron's common.pt is read with `weights_only`.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from runner.errors import UserError

FOLDER = "model"  # inside the trainer's part of a checkpoint
METADATA = ".metadata"
BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
_DCP = "torch.distributed.checkpoint"
ALLOWED = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties")),
    *((f"{_DCP}.metadata", name) for name in ("ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((f"{_DCP}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def check(folder: Path) -> None:
    """UserError unless `folder` (trainer/model of a checkpoint) can be loaded without executing anything in it."""
    try:
        backends = json.loads((folder / "metadata.json").read_text())
    except (OSError, ValueError) as error:
        raise _refusal(folder / "metadata.json", str(error)) from None
    if backends != BACKENDS:
        raise _refusal(folder / "metadata.json", "it names other formats than torch_dist and torch")
    read_metadata(folder / METADATA)
    try:
        torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged archive makes of itself
        raise _refusal(folder / "common.pt", (str(error).splitlines() or [type(error).__name__])[0]) from None


def read_metadata(path: Path) -> Metadata:
    """The table of tensors in `path`; UserError when it holds anything else."""
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise _refusal(path, str(error) or type(error).__name__) from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise _refusal(path, f"it holds a {type(metadata).__name__}")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            raise _refusal(path, f"{name!r} is no tensor in it")
    if not isinstance(metadata.storage_data, dict):
        raise _refusal(path, "it names no files")
    for index, place in metadata.storage_data.items():
        file = getattr(place, "relative_path", None)
        if not isinstance(index, MetadataIndex) or not isinstance(file, str) or Path(file).name != file:
            raise _refusal(path, f"it names {file!r}, which is no file of the folder")
    return metadata


def guard() -> None:
    """From now on torch reads tables of tensors in this process through `read_metadata`, and objects not at all."""
    FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]


def _read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    metadata = read_metadata(Path(self._get_metadata_path(kwargs.get("rank"))))
    if metadata.storage_meta is None:
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _load_bytes(self: DefaultLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
    raise RuntimeError(f"{read_item.dest_index.fqn} is stored as an object; only tensors are read")


def _refusal(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is not a table that this program writes: {reason}",
        fix="another checkpoint; this one is damaged, or was made to run code on the machine that reads it",
    )
