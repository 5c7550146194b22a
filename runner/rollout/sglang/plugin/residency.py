"""Residency: the bits that an engine computes with are those that it received, on all of its ranks together.

An engine stacks, shards and copies what it loads, each rank for itself. So nothing is assumed about where a tensor lies: it is
loaded with every bit inverted, and the resident values that change are those that follow it. Together they must be as many as the
tensor has (or a multiple, where ranks hold copies) and be the same values. Loading the tensor itself must then give back, on
every rank, the bits that were resident before. Values that the engine derived from resident ones (effective weights of the CPU
twin) are derived again and compared.

Where the engine repacks for a kernel (INT4 for Marlin on CUDA), no value follows a bit of the tensor any more. There a whole
layer is restored, loaded and repacked again, by SGLang's own functions as in a weight update, and must have the bits it had.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

Tensors = list[tuple[str, torch.Tensor]]
WORD = 1 << 64
CHUNK = 1 << 22  # values that are mixed at one time


@dataclass(frozen=True)
class Held:
    """What one rank holds of tensors that are loaded together. Fingerprints are sums, so that those of shards add up."""

    size: int  # values of the tensors
    fingerprint: int | None  # of the tensors, in the dtype that they are resident in; None where nothing is
    resident_size: int
    resident_fingerprint: int


def check(model: Any, tensors: Tensors) -> tuple[list[str], dict[str, Held]]:
    """(problems of this rank, what it holds by name). Layer by layer: that much is copied."""
    layers: dict[str, Tensors] = defaultdict(list)
    for name, tensor in tensors:
        layers[layer_of(name)].append((name, tensor))
    problems: list[str] = []
    held: dict[str, Held] = {}
    for layer, of_layer in layers.items():
        problems += _check_layer(model, layer, of_layer, held)
    return problems, held


def check_repacked(model: Any, layer: str, tensors: Tensors, device: torch.device) -> list[str]:
    """Problems of one layer, all of whose tensors must be given: what is restored and not loaded again would be lost."""
    from sglang.srt.model_loader.loader import DefaultModelLoader

    module = model.get_submodule(layer.removesuffix("."))
    before = {name: tensor.detach().clone() for name, tensor in _computed_with(module)}
    DefaultModelLoader.restore_weights_before_loading(module, device)
    model.load_weights(iter(tensors))
    DefaultModelLoader.postprocess_weights(module, device)
    after = dict(_computed_with(module))
    return [
        f"{layer}{name}: resident values differ from those that loading and repacking the layer again gives"
        for name in sorted(before.keys() | after.keys())
        if name not in before or name not in after or differing(before[name], after[name]).any()
    ]


def _computed_with(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from _tensors_of(module)
    for name, part in module.named_modules():
        for key, tensor in getattr(part, "effective", {}).items():
            yield f"{name}.effective {key}", tensor


def of_all_ranks(held: list[dict[str, Held]]) -> list[str]:
    """Problems that no rank sees alone, from what every rank of an engine holds."""
    problems = []
    for names in held[0] if held else ():
        shares = [of_rank[names] for of_rank in held]
        size, resident = shares[0].size, sum(share.resident_size for share in shares)
        copies, rest = divmod(resident, size) if size else (1, resident)
        if rest or not 1 <= copies <= len(held):
            where = f" on {len(held)} ranks" if len(held) > 1 else ""
            problems.append(f"{names}: has {size} values, but {resident} resident values follow it{where}")
            continue
        expected = next((share.fingerprint for share in shares if share.fingerprint is not None), 0)
        if (sum(share.resident_fingerprint for share in shares) - copies * expected) % WORD:
            problems.append(f"{names}: the resident values that follow it are not its own: shards overlap, or were changed")
    return problems


def fingerprint(values: torch.Tensor) -> int:
    """Sum over a mix (splitmix64) of each value's bits, modulo 2^64: the same for the same values in any order and any shards."""
    width = values.element_size()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    total = 0
    for chunk in values.detach().contiguous().reshape(-1).view(integers).split(CHUNK):
        mixed = chunk.to(torch.int64) + _signed(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> 30)) * _signed(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> 27)) * _signed(0x94D049BB133111EB)
        total += int((mixed ^ (mixed >> 31)).sum())
    return total % WORD


def _signed(word: int) -> int:
    return word - WORD if word >= WORD // 2 else word


def _check_layer(model: Any, layer: str, tensors: Tensors, held: dict[str, Held]) -> list[str]:
    resident = {name: parameter for name, parameter in _tensors_of(model) if layer_of(name) == layer}
    problems = []
    before = {name: parameter.detach().clone() for name, parameter in resident.items()}
    for pieces in _loadable_alone(tensors):
        model.load_weights((name, _inverted(tensor)) for name, tensor in pieces)
        follows = {name: differing(resident[name], before[name]) for name in resident}
        follows = {name: where for name, where in follows.items() if where.any()}
        model.load_weights(iter(pieces))
        names = " + ".join(name for name, _ in pieces)
        held[names] = _held(pieces, {name: resident[name].detach().reshape(-1)[where] for name, where in follows.items()})
        wrong = [name for name in resident if differing(resident[name], before[name]).any()]
        if wrong:
            problems.append(f"{names}: resident {', '.join(wrong)} differ from what was received")
            for name in wrong:
                before[name] = resident[name].detach().clone()
    for name, module in model.named_modules():
        if hasattr(module, "derive_effective") and layer_of(name + ".") == layer:
            again = module.derive_effective()
            wrong = [key for key in again if differing(module.effective[key], again[key]).any()]
            problems += [f"{name}: resident effective {key} differs from resident integers and scales" for key in wrong]
    return problems


def _held(pieces: Tensors, following: dict[str, torch.Tensor]) -> Held:
    size = sum(tensor.numel() for _, tensor in pieces)
    if not following:
        return Held(size, None, 0, 0)
    dtype = next(iter(following.values())).dtype  # of parameters that share a tensor, or are loaded together
    wanted = sum(fingerprint(tensor.to(dtype)) for _, tensor in pieces) % WORD
    found = sum(fingerprint(values) for values in following.values()) % WORD
    return Held(size, wanted, sum(values.numel() for values in following.values()), found)


def differing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[values] bool, in row-major order. Compares bits, so that NaN equals itself and -0.0 is not 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return torch.ones(max(a.numel(), b.numel()), dtype=torch.bool, device=a.device)
    bytes_a, bytes_b = (t.detach().contiguous().reshape(-1).view(torch.uint8).view(-1, a.element_size()) for t in (a, b))
    return (bytes_a != bytes_b).any(-1)


def _inverted(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().reshape(-1)
    return torch.bitwise_not(flat.view(torch.uint8)).view(flat.dtype).reshape(tensor.shape)


def layer_of(name: str) -> str:
    """`model.layers.3.` of `model.layers.3.mlp.up_proj.weight`; "" outside of layers."""
    head, marker, rest = name.partition(".layers.")
    return f"{head}{marker}{rest.partition('.')[0]}." if marker else ""


def _tensors_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _loadable_alone(tensors: Tensors) -> list[Tensors]:
    """DeepSeek's loader fuses the two low-rank projections and waits for both: they go together."""
    fused = [item for item in tensors if ".q_a_proj." in item[0] or ".kv_a_proj_with_mqa." in item[0]]
    alone = [[item] for item in tensors if item not in fused]
    return [*alone, fused] if fused else alone
