"""A folder against a plan, and folders or streams of weights against each other: formats, integers, scales.

Every function returns a list of differences in words, [] when the sides agree; nothing is repaired.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from runner.convert.source import one_by_one, open_shard, open_source, read
from runner.data import ExportedTensor, WeightStream
from runner.errors import UserError
from runner.models import Parameter
from runner.models.config_file import CONFIG, read_json
from runner.precision import formats
from runner.precision.audit import audit
from runner.precision.plan import PrecisionPlan, shorten
from runner.precision.quantization_config import nested_quantization_config
from runner.precision.tensor_format import TensorFormat

FOREIGN_PARTS = ("weight_g_idx",)  # of GPTQ's activation order


def weight_of(tensor_name: str) -> str:
    """`x.weight_packed`, `x.weight_scale`, ... -> `x.weight`; other names as they are."""
    module, _, part = tensor_name.rpartition(".")
    return f"{module}.weight" if part in (*formats.part_names(), *FOREIGN_PARTS) else tensor_name


def format_of_parts(name: str, parts: Mapping[str, torch.Tensor]) -> str:
    """The format that a weight's parts are in, from names and dtypes; raises UserError for a mixture that is none."""
    module = name.removesuffix(".weight")
    own = {part.removeprefix(f"{module}."): tensor for part, tensor in parts.items()}
    for spec in sorted(formats.all_formats(), key=lambda spec: not spec.quantized):
        if spec.holds(own):
            return spec.name
    if list(parts) == [name]:  # a bias, or another vector under a name of its own
        return formats.UNQUANTIZED
    raise UserError(f"{name}: parts {', '.join(sorted(parts))} are no known format")


def read_checkpoint(folder: Path, parameters: Iterable[Parameter] = ()) -> Iterator[ExportedTensor]:
    """Every weight of a checkpoint folder, one at a time, sorted by name; those of `parameters` out of stacks of experts."""
    source = one_by_one(open_source(folder), parameters)
    groups: dict[str, list[str]] = {}
    for tensor_name in source.tensors:
        groups.setdefault(weight_of(tensor_name), []).append(tensor_name)
    for name in sorted(groups):
        parts: dict[str, torch.Tensor] = {}
        for tensor_name in groups[name]:
            stored = source.tensors[tensor_name]
            with open_shard(folder / stored.shard) as handle:
                parts[tensor_name] = read(handle, stored)
        yield ExportedTensor(name, format_of_parts(name, parts), parts)


def quantization_config_of(folder: Path) -> dict[str, Any] | None:
    """`quantization_config` of a folder's config.json, wherever it nests it; None for a bf16 checkpoint."""
    return nested_quantization_config(read_json(folder / CONFIG))


def audit_checkpoint(plan: PrecisionPlan, folder: Path, label: str = "checkpoint", unused: Container[str] = ()) -> list[str]:
    """A plan against a folder: its quantization_config, and what its tensors really are.

    The config may say one thing and the tensors another: both are compared with the plan, tensor by tensor. `unused`: stored
    tensors that belong to no parameter, and to no error.
    """
    found: list[str] = []
    try:
        claimed = plan.reread(quantization_config_of(folder))
        found += audit(("run", plan), (f"{label} config.json", claimed))
    except UserError as error:
        found.append(f"{label} config.json: {error.problem}")
    seen: set[str] = set()
    groups: dict[str, list[str]] = {}
    fused: dict[str, set[float]] = {}
    for exported in read_checkpoint(folder, plan.parameters.values()):
        seen.add(exported.name)
        if plan.ties(exported.name) or exported.name not in plan.tensors and all(part in unused for part in exported.parts):
            continue
        if exported.name not in plan.tensors:
            groups.setdefault("not a parameter of this model", []).append(exported.name)
            continue
        for problem in tensor_problems(exported, plan.tensors[exported.name], plan.parameters[exported.name].shape):
            groups.setdefault(f"{plan.parameters[exported.name].role.name}: {problem}", []).append(exported.name)
        together = plan.parameters[exported.name].fused
        shared = exported.parts.get(f"{exported.name}_global_scale")
        if together is not None and shared is not None:
            fused.setdefault(together, set()).add(float(shared))
    apart = [matrix for matrix, scales in fused.items() if len(scales) > 1]
    if apart:
        groups["weights that engines fuse share no global scale"] = apart
    missing = [name for name in plan.tensors if name not in seen]
    if missing:
        groups["missing"] = missing
    return found + [f"{label}: {problem}: {shorten(names)}" for problem, names in groups.items()]


def tensor_problems(exported: ExportedTensor, expected: TensorFormat, shape: tuple[int, ...]) -> list[str]:
    """How one stored tensor differs from the grid it should be on: format, layout, scales, zero points, values."""
    if exported.format != expected.format:
        return [f"run {expected.format}, stored {exported.format}"]
    module, parts = exported.name.removesuffix(".weight"), exported.parts
    if not expected.quantized:
        return [] if tuple(parts[exported.name].shape) == shape else [f"shape {tuple(parts[exported.name].shape)}"]
    found = []
    if f"{module}.weight_zero_point" in parts and expected.symmetric:
        found.append("run symmetric, stored asymmetric (a zero point lies beside it)")
    scale = parts.get(f"{module}.weight_scale_inv", parts.get(f"{module}.weight_scale"))
    if scale is None:
        return [*found, "no scales beside it"]
    dtype = {"e8m0": torch.uint8}.get(expected.scale_dtype) or getattr(torch, expected.scale_dtype)
    if scale.dtype is not dtype:
        found.append(f"scale dtype run {expected.scale_dtype}, stored {str(scale.dtype).removeprefix('torch.')}")
    body, *others = expected.parts(shape)
    (wanted,) = (part.shape for part in others if part.name in ("weight_scale", "weight_scale_inv"))
    if tuple(scale.shape) != wanted:
        found.append(f"scale shape run {wanted}, stored {tuple(scale.shape)} (group_size or strategy differ)")
    values = scale.float()
    if not torch.isfinite(values).all() or (expected.scale_dtype != "e8m0" and not (values > 0).all()):
        found.append("scales that are not positive and finite")
    stored = tuple(parts[f"{module}.{body.name}"].shape)
    if stored != body.shape:
        found.append(f"packed shape {stored} instead of {body.shape}")
    return found


def compare_streams(a: WeightStream, b: WeightStream, names: tuple[str, str] = ("a", "b")) -> list[str]:
    """Two streams of exported tensors, in any order: each difference with the tensor's name.

    Memory: one tensor of each, plus those that one stream has sent and the other has not yet.
    """
    found: list[str] = []
    waiting: tuple[dict[str, ExportedTensor], dict[str, ExportedTensor]] = ({}, {})
    streams, seen = (iter(a), iter(b)), (set[str](), set[str]())
    open_sides = [0, 1]
    while open_sides:
        for side in list(open_sides):
            exported = next(streams[side], None)
            if exported is None:
                open_sides.remove(side)
                continue
            if exported.name in seen[side]:
                found.append(f"{exported.name}: sent twice by {names[side]}")
                continue
            seen[side].add(exported.name)
            partner = waiting[1 - side].pop(exported.name, None)
            if partner is None:
                waiting[side][exported.name] = exported
            else:
                pair = (exported, partner) if side == 0 else (partner, exported)
                found += compare_tensors(*pair, names)
    for side in (0, 1):
        found += [f"{name}: only in {names[side]}" for name in waiting[side]]
    return found


def compare_tensors(a: ExportedTensor, b: ExportedTensor, names: tuple[str, str] = ("a", "b")) -> list[str]:
    """Bit differences between two exported forms of one weight, part by part."""
    if a.format != b.format:
        return [f"{a.name}: {names[0]} {a.format}, {names[1]} {b.format}"]
    found = []
    for part in [*a.parts, *(part for part in b.parts if part not in a.parts)]:
        if part not in a.parts or part not in b.parts:
            found.append(f"{part}: only in {names[0] if part in a.parts else names[1]}")
            continue
        problem = _part_difference(part, a.format, a.parts[part], b.parts[part], names)
        if problem:
            found.append(f"{part}: {problem}")
    return found


def _part_difference(part: str, kind: str, a: torch.Tensor, b: torch.Tensor, names: tuple[str, str]) -> str | None:
    if a.dtype is not b.dtype:
        plain = [str(tensor.dtype).removeprefix("torch.") for tensor in (a, b)]
        return f"dtype {names[0]} {plain[0]}, {names[1]} {plain[1]}"
    if a.shape != b.shape:
        return f"shape {names[0]} {tuple(a.shape)}, {names[1]} {tuple(b.shape)}"
    left, right = _values(part, kind, a.detach().cpu()), _values(part, kind, b.detach().cpu())
    different = int((left != right).sum())
    if not different:
        return None
    share = f"{different} of {left.numel()} values differ"
    if torch.equal(left.flatten().sort().values, right.flatten().sort().values):
        return f"{share}, yet both hold the same values: another layout at equal shape"
    return share


def _values(part: str, kind: str, tensor: torch.Tensor) -> torch.Tensor:
    """Integers to compare bit for bit: unpacked where packed, else the raw bits."""
    if part.endswith("weight_packed"):
        return formats.spec_of(kind).unpacked(tensor)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(width)


def compare_checkpoints(a: Path, b: Path) -> list[str]:
    """Two checkpoint folders: quantization_config as text, and every tensor bit for bit."""
    found = []
    configs = [quantization_config_of(folder) for folder in (a, b)]
    if configs[0] != configs[1]:
        keys = sorted({*(configs[0] or {}), *(configs[1] or {})})
        differing = [key for key in keys if (configs[0] or {}).get(key) != (configs[1] or {}).get(key)]
        found.append(f"quantization_config differs in {', '.join(differing)}")
    return found + compare_streams(read_checkpoint(a), read_checkpoint(b), (a.name, b.name))
