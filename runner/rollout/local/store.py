"""Where received tensors go, and the proof that they got there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from runner.data import ExportedTensor
from runner.errors import UserError
from runner.precision.plan import PrecisionPlan
from runner.rollout.local.model import EngineModel
from runner.rollout.local.weights import Int4Weight, ResidentWeight, int4_kernel_limits
from runner.weights.bits import Changes, same_bits
from runner.weights.stream import SealedTensor, check, wire_bytes


@dataclass
class LoadOutcome:
    """Counts of one sync."""

    problems: list[str] = field(default_factory=list)
    arrived: int = 0
    wire_bytes: int = 0
    resident_checked: int = 0
    changes: Changes = field(default_factory=Changes)


class WeightStore:
    """The engine's resident tensors by HF on-disk name."""

    def __init__(self, model: EngineModel, plan: PrecisionPlan) -> None:
        self.model, self.plan = model, plan
        self.order = list(plan.tensors)

    def load(self, stream: Iterable[SealedTensor], *, check_all: bool, check_tensors: int, turn: int) -> LoadOutcome:
        """Verify on arrival, repack, make resident, then compare a sample (rotating with `turn`) with what is resident."""
        outcome = LoadOutcome()
        picked = set(self.order) if check_all else self._rotating(check_tensors, turn)
        kept: dict[str, ExportedTensor] = {}
        partial: dict[int, dict[str, ExportedTensor]] = {}
        seen: set[str] = set()
        for sealed in stream:
            item = sealed.exported
            outcome.arrived += 1
            outcome.wire_bytes += wire_bytes(item)
            problems = check(sealed) or self._unfit(item, seen)
            seen.add(item.name)
            if problems:
                outcome.problems += problems
                continue
            weight = self.model.weights.get(item.name)
            if weight is None:
                self._copy(item)
            else:
                pieces = partial.setdefault(id(weight), {})
                pieces[item.name] = item
                if len(pieces) == len(weight.names):
                    self._replace(weight, [pieces[name] for name in weight.names], outcome)
                    del partial[id(weight)]
            if item.name in picked or (weight is not None and picked & set(weight.names)):
                kept[item.name] = item
        outcome.problems += [f"{name}: did not arrive" for name in self.order if name not in seen]
        if not outcome.problems:
            outcome.problems += self._check(kept, outcome)
        return outcome

    def check_resident(self, stream: Iterable[ExportedTensor]) -> list[str]:
        outcome = LoadOutcome()
        return self._check({item.name: item for item in stream}, outcome)

    def _rotating(self, count: int, turn: int) -> set[str]:
        if not count:
            return set()
        first = turn * count % len(self.order)
        return {self.order[(first + i) % len(self.order)] for i in range(min(count, len(self.order)))}

    def _unfit(self, item: ExportedTensor, seen: set[str]) -> list[str]:
        """Why a tensor that arrived intact still cannot be loaded."""
        if item.name not in self.plan.tensors:
            return [f"{item.name}: the precision plan has no such tensor"]
        if item.name in seen:
            return [f"{item.name}: arrived twice in one session"]
        wanted = self.plan.format_of(item.name)
        if item.format != wanted.format:
            return [f"{item.name}: arrived as {item.format}, the engine computes with {wanted}"]
        shape = tuple(self.plan.parameters[item.name].shape)
        if not wanted.quantized and tuple(item.parts[item.name].shape) != shape:
            return [f"{item.name}: arrived with shape {tuple(item.parts[item.name].shape)}, the model has {shape}"]
        return []

    def _copy(self, item: ExportedTensor) -> None:
        self.model.others[item.name].copy_(item.parts[item.name])

    def _replace(self, weight: ResidentWeight, pieces: list[ExportedTensor], outcome: LoadOutcome) -> None:
        fresh = weight.repack(pieces)
        if weight.format.quantized:
            for key, tensor in fresh.items():
                old = weight.tensors.get(key)
                if old is None or old.shape != tensor.shape or key.endswith("weight_shape"):
                    continue
                kind = "scales" if "scale" in key else "integers"
                bits = weight.format.bits if kind == "integers" else 8 * tensor.element_size()
                if kind == "scales" and isinstance(weight, Int4Weight):
                    old, tensor = old[..., 0], tensor[..., 0]  # beside each scale lies a zero point that is always 0
                outcome.changes.count(kind, old, tensor, bits)
        weight.load(fresh)

    def _check(self, kept: dict[str, ExportedTensor], outcome: LoadOutcome) -> list[str]:
        problems = []
        done: set[int] = set()
        for name, item in kept.items():
            weight = self.model.weights.get(name)
            if weight is None:
                resident = self.model.others[name]
                outcome.resident_checked += 1
                if not same_bits(resident, item.parts[name].to(resident.device, resident.dtype)):
                    problems.append(f"{name}: resident bits differ from what was received")
                continue
            if id(weight) in done or not all(piece in kept for piece in weight.names):
                continue
            done.add(id(weight))
            outcome.resident_checked += len(weight.names)
            for part in weight.differences(weight.repack([kept[piece] for piece in weight.names])):
                problems.append(f"{' + '.join(weight.names)}: resident {part} differ from what was received")
        return problems

    def effective_weight(self, name: str) -> torch.Tensor:
        weight = self.model.weights.get(name)
        if weight is None:
            if name not in self.model.others or self.model.others[name].dim() != 2:
                raise UserError(f"{name} is no matmul weight of this engine")
            return self.model.others[name].clone()
        identity = torch.eye(weight.columns, dtype=self.model.dtype, device=self.model.device)
        first = sum(weight.rows[: weight.names.index(name)])
        return weight.linear(identity).t()[first : first + weight.rows[weight.names.index(name)]].contiguous()

    def formats(self) -> dict[str, str]:
        """Format by HF name, of what is resident."""
        plain = dict.fromkeys(self.model.others, "bf16")
        return plain | {name: weight.format.format for name, weight in self.model.weights.items()}

    def _quantized(self) -> Iterator[ResidentWeight]:
        unique = {id(weight): weight for weight in self.model.weights.values()}
        return (weight for weight in unique.values() if weight.format.quantized)

    def kernels(self) -> dict[str, object]:
        """Kinds of computation over the quantized weights, and the reasons of those that the int4 kernel cannot take."""
        kinds = Counter(weight.kind for weight in self._quantized())
        reasons = sorted(
            {
                int4_kernel_limits((sum(w.rows), w.columns), w.format, self.model.dtype, self.model.device)
                for w in self._quantized()
                if w.format.format == "int4" and w.kind == "transient"
            }
        )
        return {"kernels": dict(kinds), "int4_fallback": reasons}

    def product_rounding(self) -> str:
        """fp32 only where every quantized weight is multiplied by the CPU int4 kernel, which does not round the product."""
        kinds = {weight.kind for weight in self._quantized()}
        return "fp32" if kinds == {"int4_kernel"} and self.model.device.type == "cpu" else "bf16"
