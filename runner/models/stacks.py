"""Weights that a checkpoint folder holds together with those of the other experts: one tensor per projection, as gpt-oss has it.

Everywhere else a weight is a matrix [out, in] under the name that the family's table gives it. This file is the way between the
two for every part of a weight. The gate's rows and the up projection's take turns in a stack (`InStack.step` 2).

    part of a weight          stored in         shape
    weight (bf16)             <stack>           [experts, in, out]: transposed
    weight_packed (mxfp4)     <stack>_blocks    [experts, out, in / 32, 16]
    weight_scale (e8m0)       <stack>_scales    [experts, out, in / 32]
    bias                      <stack>_bias      [experts, out]

Parts and stacks have the same bytes in another order: nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.errors import UserError
from runner.models.family import Parameter

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
SUFFIXES = {"weight": "", "weight_packed": "_blocks", "weight_scale": "_scales", "bias": "_bias"}
BLOCK_BYTES = 16  # 32 codes of four bits


@dataclass(frozen=True)
class Place:
    """Where one part of an expert's weight lies in the tensor `name` of a folder."""

    name: str  # "model.layers.0.mlp.experts.gate_up_proj_blocks"
    part: str  # a key of SUFFIXES
    expert: int
    experts: int
    first: int
    step: int

    def stored_shape(self, shape: Shape) -> Shape:
        """Of the stack, from that of the part: `out` comes first in it."""
        rows, rest = shape[0] * self.step, shape[1:]
        if self.part == "weight":
            return (self.experts, *rest, rows)
        if self.part == "weight_packed":
            return (self.experts, rows, rest[0] // BLOCK_BYTES, BLOCK_BYTES)
        return (self.experts, rows, *rest)

    def shape(self, stored: Shape) -> Shape | None:
        """Inverse of `stored_shape`; None for a tensor that is no such stack."""
        dimensions = {"weight": 3, "weight_packed": 4, "weight_scale": 3, "bias": 2}[self.part]
        if len(stored) != dimensions or stored[0] != self.experts:
            return None
        rows, rest = (stored[2], stored[1:2]) if self.part == "weight" else (stored[1], stored[2:])
        if self.part == "weight_packed":
            rest = (rest[0] * rest[1],)
        found = (rows // self.step, *rest)
        return found if rows and self.stored_shape(found) == stored else None

    def of(self, expert: torch.Tensor) -> torch.Tensor:
        """The part as a view of stack[expert], for reading and writing."""
        if self.part == "weight":
            return expert[:, self.first :: self.step].T
        rows = expert[self.first :: self.step]
        return rows.view(len(rows), -1) if self.part == "weight_packed" else rows


def places(parameter: Parameter) -> Iterator[tuple[str, Place]]:
    """(name of a part, where it lies) of whatever parts a weight in a stack may have."""
    stack = parameter.stack
    if stack is None:
        return
    assert parameter.expert is not None
    module, _, kind = parameter.name.rpartition(".")
    for part, suffix in SUFFIXES.items():
        if (part == "bias") == (kind == "bias"):
            place = Place(f"{stack.name}{suffix}", part, parameter.expert, stack.experts, stack.first, stack.step)
            yield f"{module}.{part}", place


def place_of(name: str, parameters: Mapping[str, Parameter]) -> Place | None:
    """Of a part by its name; None for one that no stack holds."""
    module, _, part = name.rpartition(".")
    parameter = parameters.get(f"{module}.{'bias' if part == 'bias' else 'weight'}")
    return None if parameter is None else dict(places(parameter)).get(name)


def laid(weights: Iterable[Mapping[str, torch.Tensor]], parameters: Mapping[str, Parameter]) -> Iterator[dict[str, torch.Tensor]]:
    """Parts by name, weight by weight -> tensors as a folder holds them. What belongs into a stack waits until that is complete,
    in the memory of the stack; the rest passes. UserError for stacks that stay incomplete."""
    stacks: dict[str, torch.Tensor] = {}
    missing: dict[str, int] = {}
    for parts in weights:
        passing, complete = dict[str, "torch.Tensor"](), dict[str, "torch.Tensor"]()
        for name, tensor in parts.items():
            place = place_of(name, parameters)
            if place is None:
                passing[name] = tensor
                continue
            if place.name not in stacks:
                stacks[place.name] = tensor.new_empty(place.stored_shape(tuple(tensor.shape)))
                missing[place.name] = place.experts * place.step
            place.of(stacks[place.name][place.expert]).copy_(tensor)
            missing[place.name] -= 1
            if not missing[place.name]:
                complete[place.name] = stacks.pop(place.name)
        if passing or complete:
            yield passing | complete
    if stacks:
        raise UserError(f"{', '.join(stacks)}: weights of some experts are missing")
