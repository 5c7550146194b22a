"""Weight updates as the difference to the version before: what travels through a shared disk shrinks to what changed.

A delta folder has, per changed tensor, either the indices and new values of the elements that differ or, where those would be
larger, the tensor itself. Every host patches its own full copy and loads that whole: the engines' digests are those of the
trainer's tensors, so a delta that was applied to the wrong base, or torn, is found like any other corruption.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import UserError
from runner.weights.transports.base import KEY, Site, register
from runner.weights.transports.files import Files, FilesDriver

if TYPE_CHECKING:
    import torch

    from runner.data import ExportedTensor
    from runner.weights.stream import SealedTensor
    from runner.weights.weight_set import WeightSet

INDEX, VALUE, WHOLE = "index", "value", "whole"


class DiskDelta(Files):
    """Engines read the patched copy as they read any files."""

    name = "disk_delta"

    def traffic(self, stream: int, engines: int, ranks: int) -> tuple[int, str]:
        return stream // 100 * (1 + engines), "for each 1% of the bytes that changed; written once, read by every engine"

    def driver(self, site: Site) -> FilesDriver:
        from runner.weights.place import shared_memory_folder

        return FilesDriver(self.name, DeltaWriter(site.disk, shared_memory_folder(site.needed_bytes)))


class DeltaWriter:
    """Writes a delta under `shared` and the patched full copy under `local`; the first version travels whole."""

    def __init__(self, shared: Path, local: Path) -> None:
        from runner.weights.weight_set import WeightWriter

        self._deltas = WeightWriter(shared, durable=True)
        self._local = WeightWriter(local, durable=False)
        self.root = self._local.root

    def write(self, version: int, stream: Iterable[ExportedTensor | SealedTensor], previous: WeightSet | None) -> WeightSet:
        """The full local set of this version; its `wire_bytes` are those of the delta."""
        from runner.weights.stream import sealed

        if previous is None:
            return self._local.write(version, stream, None)
        carried: list[SealedTensor] = []
        differences = self._deltas.write(version, self._differences(sealed(stream), previous, carried), None)
        patched = self._local.write(version, patch(previous, differences, carried), previous)
        patched.wire_bytes = differences.wire_bytes
        differences.remove()
        return patched

    def _differences(
        self, stream: Iterable[SealedTensor], previous: WeightSet, carried: list[SealedTensor]
    ) -> Iterator[ExportedTensor]:
        """Also notes, in `carried`, names and digests of every tensor (not its values)."""
        import torch

        from runner.data import ExportedTensor
        from runner.weights.stream import SealedTensor

        for sealed in stream:
            item = sealed.exported
            empty = {name: torch.empty(0, dtype=part.dtype) for name, part in item.parts.items()}
            carried.append(SealedTensor(ExportedTensor(item.name, item.format, empty), sealed.digests))
            parts: dict[str, torch.Tensor] = {}
            for name, new in item.parts.items():
                parts |= difference(name, new, previous)
            if parts:
                yield ExportedTensor(item.name, item.format, parts)

    def close(self) -> None:
        self._deltas.close()
        self._local.close()


def difference(name: str, new: torch.Tensor, previous: WeightSet) -> dict[str, torch.Tensor]:
    """The smaller of (indices int32, values) and the whole tensor, by entry name; {} when no bit differs."""
    import torch

    from runner.weights.weight_set import read_parts

    if name not in previous.location:
        return {f"{name}/{WHOLE}": new}
    ((_, old),) = read_parts(previous, [name])
    new = new.detach().cpu().contiguous()
    if old.shape != new.shape or old.dtype != new.dtype:
        return {f"{name}/{WHOLE}": new}
    differs = (_bits(old) != _bits(new)).any(-1).nonzero().flatten()
    if not len(differs):
        return {}
    size = new.element_size()
    if len(differs) * (4 + size) >= new.numel() * size or new.numel() >= 2**31:
        return {f"{name}/{WHOLE}": new}
    return {f"{name}/{INDEX}": differs.to(torch.int32), f"{name}/{VALUE}": new.reshape(-1)[differs]}


def patch(base: WeightSet, delta: WeightSet, carried: list[SealedTensor]) -> Iterator[SealedTensor]:
    """The full stream of the new version from the old full copy and the delta as it lies on the disk."""
    from safetensors import SafetensorError, safe_open

    from runner.data import ExportedTensor
    from runner.weights.stream import SealedTensor, digest
    from runner.weights.weight_set import MANIFEST, read_parts

    manifest = json.loads((delta.folder / MANIFEST).read_text())

    def damaged(what: object) -> UserError:
        return UserError(
            f"the delta of version {delta.version} is damaged on its disk: {what}",
            key=KEY,
            fix="check the disk of outputs_dir, or rollout.weight_transport=disk_full",
        )

    places: dict[str, Path] = {}
    for file in (delta.folder / name for name in manifest["files"]):
        try:
            with safe_open(file, framework="pt") as opened:
                places |= dict.fromkeys(opened.keys(), file)
        except (OSError, SafetensorError) as error:
            raise damaged(f"{file.name}: {error}") from error
    if missing := sorted(manifest["digests"].keys() - places.keys()):
        raise damaged(f"{missing[0]} is missing")

    def entry(key: str) -> torch.Tensor:
        with safe_open(places[key], framework="pt") as opened:
            found: torch.Tensor = opened.get_tensor(key)
        if digest(found) != manifest["digests"][key]:
            raise damaged(key)
        return found

    for sealed in carried:
        item = sealed.exported
        parts: dict[str, torch.Tensor] = {}
        for name in item.parts:
            if f"{name}/{WHOLE}" in places:
                parts[name] = entry(f"{name}/{WHOLE}")
                continue
            ((_, old),) = read_parts(base, [name])
            if f"{name}/{INDEX}" in places:
                old = old.clone()
                old.view(-1)[entry(f"{name}/{INDEX}").long()] = entry(f"{name}/{VALUE}")
            parts[name] = old
        yield SealedTensor(ExportedTensor(item.name, item.format, parts), sealed.digests)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """[elements, bytes per element] uint8."""
    from runner.weights.bits import as_bytes

    return as_bytes(tensor).view(-1, tensor.element_size())


register(DiskDelta())
