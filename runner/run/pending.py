"""A rollout as files: what was generated and not yet trained on is part of a checkpoint, because its weights are gone.

    rollout/{rollout.json, tensors.safetensors}

JSON says how the objects hang together, arrays lie beside it; nothing is pickled, and only the classes named here are read back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from runner.data import Sample, Status, WeightSpan
from runner.errors import UserError
from runner.models.family import VisualTower
from runner.models.images import PlacedImage
from runner.routing.reference import RouteRef
from runner.run.collect import Group, Rollout
from runner.tasks.protocol import Prompt

OBJECTS = "rollout.json"
ARRAYS = "tensors.safetensors"
CLASSES: dict[str, type] = {
    kind.__name__: kind for kind in (Rollout, Group, Prompt, PlacedImage, Sample, VisualTower, WeightSpan)
}
ENUMS: dict[str, type[Enum]] = {kind.__name__: kind for kind in (Status,)}


def write(folder: Path, content: Any) -> None:
    """Write `content` into a new folder: plain values, lists, tuples, dicts, arrays, tensors and the classes above. An object
    that occurs twice is written once, and is one object when it is read."""
    folder.mkdir()
    writer = _Writer()
    root = writer.encode(content)
    save_file(writer.arrays, folder / ARRAYS)
    (folder / OBJECTS).write_text(json.dumps({"root": root, "objects": writer.objects}))


def read(folder: Path) -> Any:
    """What `write` wrote. UserError when the files are not of this kind."""
    try:
        found = json.loads((folder / OBJECTS).read_text())
        return _Reader(found["objects"], load_file(folder / ARRAYS)).decode(found["root"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder} holds no rollout that can be read: {error}",
            key="resume",
            fix="resume from another checkpoint, or delete this one",
        ) from error


class _Writer:
    def __init__(self) -> None:
        self.arrays: dict[str, torch.Tensor] = {}
        self.objects: list[Any] = []
        self._known: dict[int, tuple[int, Any]] = {}  # id -> place in `objects`, and the object, so that its id stays taken

    def encode(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            return [self.encode(item) for item in value]
        if isinstance(value, tuple):
            return {"tuple": [self.encode(item) for item in value]}
        if isinstance(value, dict):
            return {"dict": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if isinstance(value, Enum):
            if ENUMS.get(type(value).__name__) is not type(value):
                raise TypeError(f"a rollout with {type(value).__name__} cannot be saved (pending.py does not know it)")
            return {"enum": [type(value).__name__, value.value]}
        if isinstance(value, RouteRef):
            return self._once(value, lambda routes: self._array(routes.fetch()))
        if isinstance(value, (torch.Tensor, np.ndarray)):
            return self._once(value, self._array)
        if CLASSES.get(type(value).__name__) is type(value):
            return self._once(value, self._fields)
        raise TypeError(f"a rollout with {type(value).__name__} cannot be saved (pending.py does not know it)")

    def _once(self, value: Any, encode: Callable[[Any], Any]) -> dict[str, int]:
        if id(value) not in self._known:
            encoded = encode(value)  # first: what it holds is read before it is
            self._known[id(value)] = len(self.objects), value
            self.objects.append(encoded)
        return {"object": self._known[id(value)][0]}

    def _array(self, value: torch.Tensor | np.ndarray) -> dict[str, Any]:
        name = str(len(self.arrays))
        tensor = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value.detach().cpu()
        self.arrays[name] = tensor.clone(memory_format=torch.contiguous_format)  # safetensors refuses views of one storage
        return {"kind": "array" if isinstance(value, np.ndarray) else "tensor", "name": name}

    def _fields(self, value: Any) -> dict[str, Any]:
        return {"kind": type(value).__name__, "fields": {f.name: self.encode(getattr(value, f.name)) for f in fields(value)}}


class _Reader:
    def __init__(self, objects: list[Any], arrays: dict[str, torch.Tensor]) -> None:
        self.arrays = arrays
        self.built: list[Any] = []
        for item in objects:
            self.built.append(self._build(item))

    def _build(self, item: dict[str, Any]) -> Any:
        kind = item["kind"]
        if kind in ("array", "tensor"):
            tensor = self.arrays[item["name"]]
            return tensor if kind == "tensor" else tensor.numpy()
        return CLASSES[kind](**{name: self.decode(value) for name, value in item["fields"].items()})

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "object":
            return self.built[content]
        if kind == "tuple":
            return tuple(self.decode(item) for item in content)
        if kind == "dict":
            return {self.decode(key): self.decode(item) for key, item in content}
        name, member = cast(list[str], content)
        return ENUMS[name](member)
