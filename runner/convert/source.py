"""A checkpoint folder as the converter reads it: headers first, so that every problem is known before a byte is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from runner.errors import UserError
from runner.models import FAMILIES, Parameter
from runner.schema import ModelConfig
from runner.weights.files import DTYPES

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
SINGLE = "model.safetensors"
SKIPPED_FOLDERS = (".git", ".cache")  # a version store and a downloader's state, not parts of a model


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies and what it is."""

    name: str
    shard: str  # file name inside the folder
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """A readable checkpoint folder.

    shards   file names, in order; tensors  on-disk name -> where it lies; indexed  False for a single model.safetensors
    """

    folder: Path
    config: dict[str, Any]
    shards: tuple[str, ...]
    tensors: dict[str, StoredTensor] = field(repr=False)
    indexed: bool

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def other_files(self) -> list[Path]:
        """Everything else in the folder (tokenizer, chat template, remote code), relative to it; subfolders too."""
        mine = {*self.shards, *self.stray_shards(), INDEX, CONFIG}
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        relative = (path.relative_to(self.folder) for path in found)
        return [path for path in relative if str(path) not in mine and path.parts[0] not in SKIPPED_FOLDERS]

    def stray_shards(self) -> list[str]:
        """Weights that the index does not name: engines that read every *.safetensors would take them for the target's."""
        return sorted({path.name for path in self.folder.glob("*.safetensors")} - set(self.shards))


def open_source(folder: Path) -> Source:
    """Read config.json, the index and every shard's header; raises UserError for the first thing that is wrong.

    A truncated shard is found here: safetensors refuses a file whose length its header does not explain.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", key="convert.source", fix="source=<a folder with config.json>")
    config = _read_json(folder / CONFIG)
    indexed = (folder / INDEX).is_file()
    weight_map: dict[str, str] | None = None
    if indexed:
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX} has no weight_map", fix="download the checkpoint's index again")
        shards = tuple(sorted(set(weight_map.values())))
    else:
        shards = (SINGLE,)
        if not (folder / SINGLE).is_file():
            raise UserError(
                f"{folder} holds neither {SINGLE} nor {INDEX}",
                key="convert.source",
                fix="the converter reads safetensors only; download or save the checkpoint in that form",
            )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(shards)} shards named by {folder / INDEX} are missing: {', '.join(missing[:3])}",
            key="convert.source",
            fix="finish the download",
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in _header(folder, shard):
            if weight_map is None or weight_map.get(tensor.name, shard) == shard:
                tensors[tensor.name] = tensor
    if weight_map is not None:
        for name, shard in weight_map.items():
            if name not in tensors:
                raise UserError(f"{INDEX} says that {shard} holds {name}, but it does not", fix="download that shard again")
    return Source(folder, config, shards, tensors, indexed)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing", fix="give a folder in Hugging Face layout") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}", fix="download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object", fix="download it again")
    return value


def open_shard(path: Path) -> Any:
    """A safetensors handle whose tensors are lazily mapped; UserError for a file that is cut or is something else."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", fix="the file is truncated or damaged; download it again") from None


def _header(folder: Path, shard: str) -> Iterator[StoredTensor]:
    with open_shard(folder / shard) as handle:
        for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
            view = handle.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise UserError(f"{name} in {shard} has dtype {view.get_dtype()}, which the converter does not know")
            yield StoredTensor(name, shard, DTYPES[view.get_dtype()], tuple(view.get_shape()))


def model_of(source: Source) -> ModelConfig:
    """The model that config.json describes; UserError for an architecture that no family reads."""
    architectures = source.config.get("architectures") or []
    family = next((f for f in FAMILIES.values() if set(f.architectures) & set(architectures)), None)
    if family is None:
        known = ", ".join(name for f in FAMILIES.values() for name in f.architectures)
        found = ", ".join(architectures) or "none"
        raise UserError(f"unknown architecture in {source.folder / CONFIG}: {found}", fix=f"known: {known}")
    try:
        read = family.from_hf_config(source.config, source.folder.name)
    except ValueError as error:
        raise UserError(str(error)) from None
    own: dict[str, Any] = {"hf_checkpoint": str(source.folder), "toy_twin": "none"}
    return ModelConfig(**(own | read))


def without_unused(source: Source, model: ModelConfig) -> tuple[Source, list[str]]:
    """The source without the tensors of parts that nothing here computes (DeepSeek-V3's multi-token-prediction layer), and with a
    config.json that does not promise them; a note about them."""
    family = FAMILIES[model.family]
    left_out = [name for name in source.tensors if family.unused(model, name)]
    if not left_out:
        return source, []
    tensors = {name: tensor for name, tensor in source.tensors.items() if name not in set(left_out)}
    config = source.config | {"num_nextn_predict_layers": model.num_mtp_layers}
    note = (
        f"{len(left_out)} tensors of multi-token-prediction layers, which runner does not use, were left out, first {left_out[0]}"
    )
    return replace(source, tensors=tensors, config=config), [note]


def parameters_of(model: ModelConfig) -> dict[str, Parameter]:
    """The family's table, by on-disk name."""
    return {parameter.name: parameter for parameter in FAMILIES[model.family].parameters(model)}
