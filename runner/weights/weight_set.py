"""One version of the weights on its way to engines: safetensors files, in shared memory or on a disk.

A set of files holds one version completely; every transport sends out of one. The set of the current version stays until the
next one is complete, for engines that have to be started again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from runner import scratch, storage
from runner.data import ExportedTensor
from runner.errors import UserError
from runner.precision.formats import spec_of
from runner.weights.bits import Changes
from runner.weights.files import write_tensors
from runner.weights.stream import SealedTensor, sealed, wire_bytes

BUCKET_BYTES = 1 << 30
MANIFEST = "manifest.json"


@dataclass
class WeightSet:
    """One version. `digests`: part name -> hash; `parts`: weight name -> its parts; `formats`: weight name -> format."""

    version: int
    folder: Path
    files: list[Path] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    parts: dict[str, list[str]] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    wire_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    changes: Changes = field(default_factory=Changes)
    location: dict[str, Path] = field(default_factory=dict)  # part name -> file

    def parts_of(self, names: Iterable[str]) -> list[str]:
        """Parts that an engine computes with. Shapes are left out: q, k and v share one place for them in a stacked module."""
        return [part for name in names for part in self.parts[name] if not part.endswith(".weight_shape")]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class WeightWriter:
    """Writes sets under `root`, a folder of this process alone. What an earlier process of the run left there is removed: a
    resumed run's first sync brings everything."""

    def __init__(self, root: Path, *, durable: bool, bucket_bytes: int = BUCKET_BYTES) -> None:
        """`durable`: versioned folders on a disk, synced and renamed into place, with a manifest; else plain files."""
        self.root, self.durable, self.bucket_bytes = root, durable, bucket_bytes
        self._count = 0
        self._stage = Stage(bucket_bytes)
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for stale in (*root.glob("v[0-9]*"), *root.glob(".v[0-9]*")):
            shutil.rmtree(stale, ignore_errors=True)

    def write(self, version: int, stream: Iterable[ExportedTensor | SealedTensor], previous: WeightSet | None) -> WeightSet:
        """Seal what is not sealed yet and write it, a bucket at a time. UserError when the disk or shared memory is full."""
        self._count += 1
        target = self.root / f"v{self._count:06d}"
        try:
            with storage.new_folder(target, durable=self.durable) as partial:
                written = WeightSet(version, partial)
                self._fill(written, stream, previous)
        except OSError as error:
            raise UserError(
                f"cannot write the weights of version {version} under {self.root}: {error}",
                key="rollout.weight_transport",
                fix="free space there, or rollout.weight_transport=disk_full with outputs_dir on a larger disk",
            ) from error
        written.folder = target
        written.files = [target / file.name for file in written.files]
        written.location = {part: target / file.name for part, file in written.location.items()}
        return written

    def _fill(self, written: WeightSet, stream: Iterable[ExportedTensor | SealedTensor], previous: WeightSet | None) -> None:
        bucket: dict[str, torch.Tensor] = {}
        size = 0
        with PartReader(previous) as before:
            for item in sealed(map(self._on_host, stream)):
                if not self._accept(item, written):
                    continue
                _count_changes(item.exported, written, before)
                bucket |= item.exported.parts
                size += wire_bytes(item.exported)
                if size >= self.bucket_bytes:
                    self._save(bucket, written)
                    bucket, size = {}, 0
            if bucket:
                self._save(bucket, written)
        if self.durable:
            manifest = {"version": written.version, "digests": written.digests, "files": [file.name for file in written.files]}
            (written.folder / MANIFEST).write_text(json.dumps(manifest))

    def _on_host(self, item: ExportedTensor | SealedTensor) -> ExportedTensor | SealedTensor:
        """Its parts leave the device here and nowhere else: hash, count of changes and file are taken of the same host copy."""
        exported = item.exported if isinstance(item, SealedTensor) else item
        parts = {name: self._stage.host(part.detach().contiguous()) for name, part in exported.parts.items()}
        exported = ExportedTensor(exported.name, exported.format, parts)
        return SealedTensor(exported, item.digests) if isinstance(item, SealedTensor) else exported

    def _accept(self, arrived: SealedTensor, written: WeightSet) -> bool:
        item = arrived.exported
        if item.name in written.parts:
            written.problems.append(f"{item.name}: arrived twice in one session")
            return False
        written.parts[item.name] = list(item.parts)
        written.formats[item.name] = item.format
        written.digests |= arrived.digests
        written.wire_bytes += wire_bytes(item)
        return True

    def _save(self, bucket: dict[str, torch.Tensor], written: WeightSet) -> None:
        path = written.folder / f"weights-{len(written.files):05d}.safetensors"
        write_tensors(bucket, path, {"format": "pt"})
        self._stage.reuse()
        path.chmod(0o600)
        written.files.append(path)
        written.location |= dict.fromkeys(bucket, path)

    def close(self) -> None:
        scratch.remove(self.root)


class Stage:
    """Pinned host memory that device tensors are copied into, the same for every bucket: a copy into pageable memory goes through
    a buffer of the driver's, and pinning anew costs as much as the copy."""

    ALIGN = 64

    def __init__(self, size: int) -> None:
        """`size` bytes are pinned at the first tensor that comes from a device."""
        self._size, self._used = size, 0
        self._buffer: torch.Tensor | None = None

    def host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same bits on the host, valid until `reuse`; a tensor that is there already as it is, one too large in memory of its
        own."""
        if not on_device(tensor):
            return tensor
        start, needed = -(-self._used // self.ALIGN) * self.ALIGN, tensor.numel() * tensor.element_size()
        if start + needed > self._size:
            return tensor.cpu()
        if self._buffer is None:
            self._buffer = torch.empty(self._size, dtype=torch.uint8, pin_memory=tensor.is_cuda)
        self._used = start + needed
        place = self._buffer[start : self._used].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor)

    def reuse(self) -> None:
        self._used = 0


def on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu"


class PartReader:
    """Parts of a set, each of whose files is opened once; without a set there are none."""

    def __init__(self, weights: WeightSet | None) -> None:
        self.weights = weights
        self._opened: dict[Path, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PartReader:
        return self

    def __exit__(self, *raised: object) -> None:
        self._opened.clear()
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        assert self.weights is not None
        path = self.weights.location[name]
        if path not in self._opened:
            self._opened[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        tensor: torch.Tensor = self._opened[path].get_tensor(name)
        return tensor


def read_parts(weights: WeightSet, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(part name, tensor) of some parts of a set."""
    with PartReader(weights) as reader:
        for name in names:
            yield name, reader.read(name)


def _count_changes(item: ExportedTensor, written: WeightSet, before: PartReader) -> None:
    """Integers and scales of a quantized tensor that differ from those of the previous set."""
    form, previous = spec_of(item.format), before.weights
    if previous is None or not form.quantized or item.name not in previous.parts:
        return
    for name in (part for part in item.parts if part in previous.location and not part.endswith("weight_shape")):
        old, new = before.read(name), item.parts[name]
        if old.shape != new.shape or old.dtype != new.dtype:
            continue
        kind = "scales" if "scale" in name.rpartition(".")[2] else "integers"
        written.changes.count(kind, old, new, form.bits if kind == "integers" else 8 * new.element_size())
