"""What lies on the disk of a checkpoint folder, held against what its config.json says: from headers alone, but for a tied head.

Values of a quantized weight mean nothing without their scales, and scales of another shape mean other values. So a folder is
read only where every stored dtype and shape is one that the plan of its own quantization_config explains, and where no tensor is
left over: neither a part of a weight nor a weight that the model does not have. The converter, the audit, the trainers and draft
models all read folders through `check`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from runner.config.schema import Role
from runner.convert.source import Source, StoredTensor, open_shard
from runner.errors import UserError, UserErrors
from runner.precision.codec import module_of
from runner.precision.formats import FLOATS, part_names
from runner.precision.plan import HEAD, PrecisionPlan, shorten
from runner.precision.tensor_format import TensorFormat

UNQUANTIZED_DTYPES = tuple(getattr(torch, name) for name in FLOATS)
# static scales of activations and of a KV cache: they describe a quantized engine and mean nothing beside bf16 weights
INPUT_PARTS = ("input_scale", "input_global_scale", "input_zero_point")
CACHE_PARTS = ("k_scale", "v_scale")
# names that quantizing programs give to parts of a weight; a tensor of this kind that no weight claims is never just copied
PART_WORDS = ("scale", "zero_point", "qweight", "qzeros", "g_idx", "absmax", "quant", "packed", "weight_shape", "blocks")
INCOMPLETE = "config.json and the shards must belong together; download both again"


def inputs_of(source: Source, name: str, tensor_format: TensorFormat) -> tuple[StoredTensor, ...]:
    """The stored tensors that make up one weight."""
    if not tensor_format.quantized:
        return (source.tensors[name],) if name in source.tensors else ()
    module = module_of(name)
    found = (f"{module}.{part}" for part in part_names())
    return tuple(source.tensors[part] for part in found if part in source.tensors)


def is_plain(inputs: tuple[StoredTensor, ...], name: str) -> bool:
    """Whether a weight lies there unquantized, whatever its plan says."""
    return len(inputs) == 1 and inputs[0].name == name and inputs[0].dtype in UNQUANTIZED_DTYPES


def is_activation_part(name: str) -> bool:
    return name.rpartition(".")[2] in (*INPUT_PARTS, *CACHE_PARTS)


def check(source: Source, plan: PrecisionPlan, key: str) -> None:
    """UserError, or UserErrors with each kind of problem, unless `problems` finds none. `key`: what named the folder."""
    found = problems(source, plan, key)
    if len(found) == 1:
        raise found[0]
    if found:
        raise UserErrors(found)


def problems(source: Source, plan: PrecisionPlan, key: str) -> list[UserError]:
    """Everything in which a folder's tensors differ from `plan`, the plan of the folder's own quantization_config."""
    found: dict[tuple[str, str | None], list[str]] = {}
    used: set[str] = set()
    missing: list[str] = []
    for name, parameter in plan.parameters.items():
        tensor_format = plan.tensors[name]
        inputs = inputs_of(source, name, tensor_format)
        used.update(tensor.name for tensor in inputs)
        if not inputs:
            missing.append(name)
        elif tensor_format.quantized and not is_plain(inputs, name):
            for text in _part_problems(inputs, name, parameter.shape, tensor_format):
                found.setdefault((text, None), []).append(name)
        else:
            for text, fix in _plain_problems(inputs[0], parameter.shape, quantized_source=bool(plan.quantized)):
                found.setdefault((text, fix), []).append(name)
    errors = _missing(source, plan, missing, key)
    errors += [_error(text, names, key, fix) for (text, fix), names in found.items()]
    errors += _left_over(source, plan, used, key)
    return errors or _other_head(source, plan, key)


def _error(text: str, names: list[str], key: str, fix: str | None) -> UserError:
    more = f" (and {len(names) - 1} more: {shorten(names[1:])})" if len(names) > 1 else ""
    return UserError(f"{names[0]} {text}{more}", key=key, fix=fix or INCOMPLETE)


def _plain_problems(stored: StoredTensor, shape: tuple[int, ...], *, quantized_source: bool) -> Iterator[tuple[str, str]]:
    if stored.dtype not in UNQUANTIZED_DTYPES:
        said = "calls it unquantized" if quantized_source else "names no quantization"
        yield (
            f"is stored as {stored.dtype} although config.json {said}",
            "give the config.json that belongs to these weights, or start from a bf16 checkpoint",
        )
    if stored.shape != shape:
        yield f"has shape {stored.shape}, config.json implies {shape}", INCOMPLETE


def _part_problems(
    inputs: tuple[StoredTensor, ...], name: str, shape: tuple[int, ...], tensor_format: TensorFormat
) -> Iterator[str]:
    """How the parts of one quantized weight differ from what its format has."""
    columns, group = shape[-1], tensor_format.group_size
    if tensor_format.strategy == "group" and columns % group:
        yield f"has {columns} columns, which groups of {group} do not divide"
        return
    module = module_of(name)
    parts = {stored.name.removeprefix(f"{module}."): stored for stored in inputs}
    for expected in tensor_format.spec.readable(tensor_format, shape):
        present = [part for part in expected.names if part in parts]
        if len(present) != 1:
            yield f"has {' and '.join(present) or f'no {expected.names[0]} beside it'}, in {tensor_format}"
        for part in present:
            stored = parts.pop(part)
            if _plain(stored.dtype) not in expected.dtypes:
                known = ", ".join(expected.dtypes)
                yield f"has {part} in {_plain(stored.dtype)}; {tensor_format} has {known}"
            if stored.shape not in expected.shapes:
                known = " or ".join(map(str, expected.shapes))
                yield f"has {part} of shape {stored.shape}; {tensor_format} of a weight {shape} has {known}"
    if parts:
        yield f"has {', '.join(sorted(parts))} beside it, which {tensor_format} does not have"


def check_scales(name: str, parts: Mapping[str, torch.Tensor], key: str) -> None:
    """UserError where scales of a quantized weight, which headers do not show, are negative or all zero.

    No quantizer writes the former, and the latter are a file that nobody finished; a group of zeros may have a scale of zero.
    """
    for part, scale in parts.items():
        if "scale" not in part.rpartition(".")[2] or not scale.is_floating_point() or not scale.numel():
            continue
        values = scale.float()
        problem = "negative scales" if (values < 0).any() else "no scale but 0" if not values.any() else None
        if problem:
            raise UserError(f"{name} has {problem} in {part}", key=key, fix="the checkpoint is damaged; download it again")


def _missing(source: Source, plan: PrecisionPlan, missing: list[str], key: str) -> list[UserError]:
    """Why weights of the table are not there."""
    if not missing:
        return []
    experts = [name for name in missing if plan.parameters[name].role is Role.routed_expert]
    fused = [name for name, stored in source.tensors.items() if ".experts." in name and len(stored.shape) == 3]
    if experts and fused:
        return [
            UserError(
                f"the experts of {source.folder} lie fused in 3-D tensors, first {fused[0]} {source.tensors[fused[0]].shape}; "
                f"they are read one by one ({experts[0]})",
                key=key,
                fix="save the checkpoint with one matrix per expert, as it was published",
            )
        ]
    return [
        UserError(
            f"{len(missing)} weights that config.json implies are not in {source.folder}: {shorten(missing)}",
            key=key,
            fix=f"{INCOMPLETE}; weights are never filled in at random",
        )
    ]


def _left_over(source: Source, plan: PrecisionPlan, used: set[str], key: str) -> list[UserError]:
    """Parts of weights that no weight claims, and weights that no part of the model has."""
    quantized = any(stored.dtype not in UNQUANTIZED_DTYPES for name, stored in source.tensors.items() if name in used)
    parts: list[str] = []
    others: dict[torch.dtype, list[str]] = {}
    unused: list[str] = []
    for name, stored in source.tensors.items():
        module, _, last = name.rpartition(".")
        if name in used or (last in CACHE_PARTS and quantized):
            continue
        if last in INPUT_PARTS and _quantized_here(source, plan, module):
            continue
        if name not in plan.parameters and any(word in last for word in PART_WORDS):
            parts.append(name)
        elif name not in plan.parameters and stored.dtype not in UNQUANTIZED_DTYPES:
            others.setdefault(stored.dtype, []).append(name)
        elif name not in plan.parameters and not plan.ties(name):
            unused.append(name)
    errors = []
    if parts:
        errors.append(
            UserError(
                f"{len(parts)} parts of quantized weights are left over, which config.json does not explain: {shorten(parts)}",
                key=key,
                fix="give the config.json that belongs to these weights",
            )
        )
    for dtype, names in others.items():
        errors.append(
            UserError(
                f"{shorten(names)} belong{'s' if len(names) == 1 else ''} to no weight that config.json implies, and "
                f"{'is' if len(names) == 1 else 'are'} stored as {dtype}",
                key=key,
                fix="start from a bf16 checkpoint",
            )
        )
    if unused:
        errors.append(
            UserError(
                f"{source.folder} has weights that the model does not use: {len(unused)} weights, first {min(unused)}",
                key=key,
                fix=f"{INCOMPLETE}; weights that a model has are never left out",
            )
        )
    return errors


def _other_head(source: Source, plan: PrecisionPlan, key: str) -> list[UserError]:
    """A tied lm_head that lies there with other values: libraries differ in which of the two they take."""
    if HEAD not in source.tensors or not plan.ties(HEAD):
        return []
    embedding = next(name for name, parameter in plan.parameters.items() if parameter.role is Role.embedding)
    tensors = []
    for stored in (source.tensors[HEAD], source.tensors[embedding]):
        with open_shard(source.folder / stored.shard) as handle:
            tensors.append(handle.get_tensor(stored.name).float())
    if torch.equal(*tensors):
        return []
    problem = f"'{source.folder}' ties lm_head to the embedding, but holds another {HEAD}"
    return [UserError(problem, key=key, fix="set tie_word_embeddings in its config.json to what the weights are")]


def _quantized_here(source: Source, plan: PrecisionPlan, module: str) -> bool:
    name = f"{module}.weight"
    if name not in plan.tensors or not plan.tensors[name].quantized:
        return False
    return not is_plain(inputs_of(source, name, plan.tensors[name]), name)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
