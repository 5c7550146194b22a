"""A checkpoint folder as the converter reads it: headers first, so that every problem is known before a byte is written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from runner.config.schema import ModelConfig
from runner.errors import UserError
from runner.models import FAMILIES, Parameter
from runner.models.common import short
from runner.models.config_file import CONFIG, family_fields, read_json
from runner.models.stacks import Place, places
from runner.weights.files import DTYPES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
SKIPPED_FOLDERS = (".git", ".cache")  # a version store and a downloader's state, not parts of a model
ROTARY = re.compile(r"(^|\.)rotary(_pos)?_emb\.inv_freq$")  # a buffer that older programs saved
MAX_INDEX_BYTES = 1 << 30
MAX_NAME_BYTES = 200
# the same weights in another form: beside a converted checkpoint they would be unquantized weights that some loaders prefer
OTHER_WEIGHTS = (
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".safetensors", ".h5", ".msgpack", ".npz", ".gguf", ".ggml"),
    *(".onnx", ".onnx_data", ".tflite", ".nemo", ".distcp", ".bin.index.json", ".safetensors.index.json", ".h5.index.json"),
)
OTHER_WEIGHTS_FOLDERS = ("original", "onnx")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies and what it is."""

    name: str
    shard: str  # file name inside the folder
    dtype: torch.dtype
    shape: tuple[int, ...]
    place: Place | None = None  # of one that is part of a stack of experts

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """A readable checkpoint folder.

    shards   file names, in order; tensors  on-disk name -> where it lies; indexed  False for a single model.safetensors
    named    whether loaders find the weights by themselves; False for numbered files without an index
    """

    folder: Path
    config: dict[str, Any]
    shards: tuple[str, ...]
    tensors: dict[str, StoredTensor] = field(repr=False)
    indexed: bool
    named: bool = True

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def other_files(self) -> list[Path]:
        """What else belongs to the model (tokenizer, chat template, remote code), relative to the folder; subfolders too.

        UserError for links that leave the folder: their content is not part of what was given.
        """
        mine = {*self.shards, *self.stray_shards(), INDEX, CONFIG}
        found = [path for path in self._everything() if str(path) not in mine and not _other_weights(path)]
        outside = [str(path) for path in found if not self._belongs(path)]
        if outside:
            raise UserError(
                f"{self.folder} holds links that lead out of it or to folders: {', '.join(outside[:3])}",
                key="convert.source",
                fix="put copies in their place, or remove them",
            )
        return [path for path in found if (self.folder / path).is_file()]

    def stray_shards(self) -> list[str]:
        """Weights that the index does not name: engines that read every *.safetensors would take them for the target's."""
        return sorted({path.name for path in self.folder.glob("*.safetensors")} - set(self.shards))

    def other_weights(self) -> list[str]:
        """Files that hold the model's weights in another form (pytorch_model.bin, original/)."""
        mine = {*self.shards, *self.stray_shards(), INDEX}
        return [str(path) for path in self._everything() if str(path) not in mine and _other_weights(path)]

    def _everything(self) -> list[Path]:
        """Files and links, relative to the folder; what lies behind links to folders is not looked at."""
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_symlink() or path.is_file())
        relative = (path.relative_to(self.folder) for path in found)
        return [path for path in relative if path.parts[0] not in SKIPPED_FOLDERS]

    def _belongs(self, path: Path) -> bool:
        """Whether a file is no link, or a link to a file of this folder or of the same download in a hub's cache."""
        if not (self.folder / path).is_symlink():
            return True
        try:
            folder, target = self.folder.resolve(), (self.folder / path).resolve()
        except (OSError, RuntimeError):  # a link that leads to itself
            return False
        inside = target.is_relative_to(folder)
        if folder.parent.name == "snapshots":  # the hub's cache: snapshots/<revision>/<file> -> blobs/<hash>
            inside = inside or target.is_relative_to(folder.parent.parent / "blobs")
        return inside and target.is_file()


def _other_weights(path: Path) -> bool:
    return path.name.endswith(OTHER_WEIGHTS) or path.parts[0] in OTHER_WEIGHTS_FOLDERS


def open_source(folder: Path, key: str = "convert.source") -> Source:
    """Read config.json, the index and every shard's header; raises UserError for the first thing that is wrong.

    A truncated shard is found here: safetensors refuses a file whose length its header does not explain. `key` is the option
    that named the folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", key=key, fix=f"{key}=<a folder with config.json>")
    config = read_json(folder / CONFIG)
    indexed = (folder / INDEX).is_file()
    weight_map: dict[str, str] | None = None
    named = True
    if indexed:
        weight_map = _weight_map(folder)
        shards = tuple(sorted(set(weight_map.values())))
        if SINGLE not in shards and (folder / SINGLE).is_file():
            raise UserError(
                f"{folder} holds {SINGLE} and an index of other files: libraries differ in which of the two they read",
                key=key,
                fix=f"keep the weights that are meant, and move {SINGLE} or {INDEX} away",
            )
    elif (folder / SINGLE).is_file():
        shards = (SINGLE,)
    else:
        shards, indexed, named = _numbered(folder, key), True, False
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(shards)} shards named by {folder / INDEX if named else 'the others'} are missing: "
            f"{', '.join(missing[:3])}",
            key=key,
            fix="finish the download",
        )
    found = [tensor for shard in shards for tensor in _header(folder, shard)]
    places = {(tensor.name, tensor.shard) for tensor in found}
    for name, shard in (weight_map or {}).items():
        if (name, shard) not in places:
            raise UserError(f"{INDEX} says that {shard} holds {name}, but it does not", fix="download that shard again")
    tensors: dict[str, StoredTensor] = {}
    for tensor in found:
        if tensor.name in tensors:
            raise UserError(
                f"{tensor.name} lies in {tensors[tensor.name].shard} and in {tensor.shard}", fix="download them again"
            )
        tensors[tensor.name] = tensor
    return Source(folder, config, shards, tensors, indexed, named)


def _weight_map(folder: Path) -> dict[str, str]:
    """The index; UserError unless every entry names a safetensors file of the folder itself."""
    found = read_json(folder / INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{folder / INDEX} has no weight_map", fix="download the checkpoint's index again")
    wrong = [file for file in found.values() if not _is_shard_name(file)]
    if wrong:
        raise UserError(
            f"{folder / INDEX} names {short(wrong[0])}; weights must be .safetensors files in the folder itself",
            fix="download the checkpoint's index again, or lay its files side by side",
        )
    return found


def _is_shard_name(name: object) -> bool:
    """Whether it is one path component: with anything more, a file elsewhere would be read, and written in a conversion."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or name.startswith("."):
        return False
    return "/" not in name and "\\" not in name and name.isprintable() and len(name.encode()) <= MAX_NAME_BYTES


def _numbered(folder: Path, key: str) -> tuple[str, ...]:
    """model-00001-of-0000N.safetensors without an index: all N names."""
    found = sorted(path.name for path in folder.glob("*.safetensors") if NUMBERED.fullmatch(path.name))
    counts = {int(match[2]) for name in found if (match := NUMBERED.fullmatch(name))}
    if len(counts) == 1 and (count := counts.pop()) in range(1, 10_000):
        return tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))
    others = sorted(path.name for path in folder.iterdir() if path.name.endswith(OTHER_WEIGHTS))
    beside = f"; it has {', '.join(others[:3])}" if others else ""
    raise UserError(
        f"{folder} holds neither {SINGLE} nor {INDEX}{beside}",
        key=key,
        fix="only safetensors are read; download or save the checkpoint in that form",
    )


def open_shard(path: Path) -> Any:
    """A safetensors handle whose tensors are lazily mapped; UserError for a file that is cut or is something else."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", fix="the file is truncated or damaged; download it again") from None


def read(handle: Any, stored: StoredTensor) -> torch.Tensor:
    """A tensor out of its opened shard; of a stack, its own part alone."""
    if stored.place is None:
        tensor: torch.Tensor = handle.get_tensor(stored.name)
        return tensor
    return stored.place.of(handle.get_slice(stored.place.name)[stored.place.expert]).contiguous()


def _header(folder: Path, shard: str) -> Iterator[StoredTensor]:
    with open_shard(folder / shard) as handle:
        for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
            view = handle.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise UserError(f"{name} in {shard} has dtype {view.get_dtype()}, which the converter does not know")
            yield StoredTensor(name, shard, DTYPES[view.get_dtype()], tuple(view.get_shape()))


def model_of(source: Source) -> ModelConfig:
    """The model that config.json describes; UserError for an architecture that no family reads."""
    _, read = family_fields(source.config, source.folder)
    own: dict[str, Any] = {"hf_checkpoint": str(source.folder), "toy_twin": "none"}
    return ModelConfig(**(own | read))


def one_by_one(source: Source, parameters: Iterable[Parameter]) -> Source:
    """The source with the parts of these weights under the weights' own names, where they lie in stacks of all experts.

    UserError for a stack of another shape than config.json implies."""
    tensors, taken = dict[str, StoredTensor](), set[str]()
    for parameter in parameters:
        for name, place in places(parameter):
            if place.name not in source.tensors:
                continue
            stack = source.tensors[place.name]
            shape = place.shape(stack.shape)
            if shape is None:
                problem = f"{place.name} has shape {stack.shape}, config.json implies {place.experts} experts"
                raise UserError(problem, fix="config.json and the shards must belong together; download both again")
            tensors[name] = StoredTensor(name, stack.shard, stack.dtype, shape, place)
            taken.add(place.name)
    if not taken:
        return source
    others = {name: tensor for name, tensor in source.tensors.items() if name not in taken}
    return replace(source, tensors=tensors | others)


def of_model(source: Source, model: ModelConfig) -> tuple[Source, list[str]]:
    """The source as the model's table names it, and notes: every expert's weights one by one (`one_by_one`), and without what
    published checkpoints hold and nothing here computes: multi-token-prediction layers that the model does not use
    (DeepSeek-V3's), which its config.json then does not promise any more, and rotary frequencies, which follow from
    config.json. Whatever else no weight claims, `stored.check` refuses."""
    family = FAMILIES[model.family]
    source = one_by_one(source, family.parameters(model))
    layers = sorted(family.unused(model, source.tensors.keys()))
    rotary = sorted(name for name in source.tensors if ROTARY.search(name) and name not in set(layers))
    notes = []
    if layers:
        notes.append(
            f"{len(layers)} tensors of multi-token-prediction layers, which runner does not use, were left out, first {layers[0]}"
        )
    if rotary:
        notes.append(f"{len(rotary)} rotary frequencies, which follow from config.json, were left out, first {rotary[0]}")
    left_out = {*layers, *rotary}
    tensors = {name: tensor for name, tensor in source.tensors.items() if name not in left_out}
    config = source.config | ({"num_nextn_predict_layers": model.num_mtp_layers} if layers else {})
    return replace(source, tensors=tensors, config=config), notes
