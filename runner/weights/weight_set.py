"""One version of the weights on its way to engines: safetensors files, in shared memory or on a disk.

A set of files holds one version completely; every transport sends out of one. The set of the current version stays until the
next one is complete, for engines that have to be started again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

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
        for item in sealed(stream):
            if not self._accept(item, written):
                continue
            _count_changes(item.exported, written, previous)
            bucket |= {part: tensor.detach().contiguous() for part, tensor in item.exported.parts.items()}
            size += wire_bytes(item.exported)
            if size >= self.bucket_bytes:
                self._save(bucket, written)
                bucket, size = {}, 0
        if bucket:
            self._save(bucket, written)
        if self.durable:
            manifest = {"version": written.version, "digests": written.digests, "files": [file.name for file in written.files]}
            (written.folder / MANIFEST).write_text(json.dumps(manifest))

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
        write_tensors({name: tensor.cpu() for name, tensor in bucket.items()}, path, {"format": "pt"})
        path.chmod(0o600)
        written.files.append(path)
        written.location |= dict.fromkeys(bucket, path)

    def close(self) -> None:
        scratch.remove(self.root)


def read_parts(weights: WeightSet, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(part name, tensor) of some parts of a set."""
    for name in names:
        with safe_open(weights.location[name], framework="pt") as opened:
            yield name, opened.get_tensor(name)


def _count_changes(item: ExportedTensor, written: WeightSet, previous: WeightSet | None) -> None:
    """Integers and scales of a quantized tensor that differ from those of the previous set."""
    form = spec_of(item.format)
    if previous is None or not form.quantized or item.name not in previous.parts:
        return
    wanted = [part for part in item.parts if part in previous.location and not part.endswith("weight_shape")]
    for name, old in read_parts(previous, wanted):
        new = item.parts[name].detach().cpu()
        if old.shape != new.shape or old.dtype != new.dtype:
            continue
        kind = "scales" if "scale" in name.rpartition(".")[2] else "integers"
        written.changes.count(kind, old, new, form.bits if kind == "integers" else 8 * new.element_size())
