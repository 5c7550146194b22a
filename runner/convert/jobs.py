"""What becomes of every tensor of a checkpoint: copied, encoded or decoded, under which names, in which output shard.

Everything here is decided from headers, before a byte of the target is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum

import torch

from runner.config.schema import ModelConfig, Role
from runner.convert.shard import Part
from runner.convert.source import INDEX, Source, StoredTensor
from runner.convert.stored import check, inputs_of, is_activation_part, is_plain
from runner.errors import UserError
from runner.models import Parameter
from runner.models.stacks import place_of
from runner.precision.codec import module_of
from runner.precision.plan import PrecisionPlan, shorten
from runner.precision.quantization_config import nested_quantization_config
from runner.precision.tensor_format import TensorFormat


class Action(Enum):
    copy = "copy"
    encode = "encode"
    decode = "decode"
    pack = "pack"  # integers and scales that are there already (GPTQ's)


@dataclass(frozen=True)
class Job:
    """One weight: the source tensors it is made of and the output tensors it becomes.

    encode: inputs are the weight, and those that share a global scale with it (nvfp4).
    pack: inputs are the weight, its integers (int8) and its scales; a shard that is an absolute path lies elsewhere.
    """

    name: str
    action: Action
    tensor_format: TensorFormat  # encode: the target's; decode: the source's; copy: bf16 plan entry
    inputs: tuple[StoredTensor, ...]
    outputs: tuple[Part, ...]
    role: str

    @property
    def input_bytes(self) -> int:
        of_source = self.inputs if self.action is Action.decode else self.inputs[:1]
        return sum(tensor.num_bytes for tensor in of_source)

    @property
    def output_bytes(self) -> int:
        return sum(part.num_bytes for part in self.outputs)


@dataclass
class Jobs:
    """All work of one conversion. `shards`: output file -> its jobs; `notes`: what a user should hear about."""

    shards: dict[str, list[Job]]
    notes: list[str] = field(default_factory=list)
    _homes: dict[str, str] = field(default_factory=dict)

    def add(self, job: Job) -> None:
        """Into the file of its first input; parts of one stack into that of the first of them."""
        shard = job.inputs[0].shard
        for part in job.outputs:
            if part.place is not None:
                shard = self._homes.setdefault(part.place.name, shard)
        self.shards[shard].append(job)

    def __iter__(self) -> Iterator[Job]:
        for jobs in self.shards.values():
            yield from jobs


def parts_of(name: str, shape: tuple[int, ...], tensor_format: TensorFormat) -> tuple[Part, ...]:
    """Names, dtypes and shapes of what `codec.encode` makes of a weight [out, in]; the writer checks them again."""
    module = module_of(name)
    return tuple(Part(f"{module}.{part.name}", getattr(torch, part.dtype), part.shape) for part in tensor_format.parts(shape))


def _placed(outputs: tuple[Part, ...], target: PrecisionPlan) -> tuple[Part, ...]:
    """The same, in stacks of all experts where the target's folder has them so."""
    if not target.in_stacks:
        return outputs
    return tuple(replace(part, place=place_of(part.name, target.parameters)) for part in outputs)


def quantizing_jobs(source: Source, plan: PrecisionPlan) -> Jobs:
    """bf16 (or fp16, fp32) to the plan's formats. Raises UserError for a source that is quantized or has other tensors."""
    if (quantization := nested_quantization_config(source.config)) is not None:
        raise UserError(
            f"{source.folder} is already quantized ({quantization.get('quant_method', 'an unnamed method')})",
            key="convert.source",
            fix="convert it to bf16 first (convert.format=bf16), or start from the bf16 checkpoint",
        )
    check(source, plan.reread(None), "convert.source")
    jobs = Jobs({shard: [] for shard in source.shards}, reader_notes(plan))
    for name, stored in source.tensors.items():
        parameter = plan.parameters.get(name)
        if parameter is None or not plan.tensors[name].quantized:
            jobs.add(_copy(stored, parameter, plan))
            continue
        tensor_format = plan.tensors[name]
        outputs = _placed(parts_of(name, stored.shape, tensor_format), plan)
        inputs = (stored, *(source.tensors[other] for other in plan.fused_with(name) if other != name))
        jobs.add(Job(name, Action.encode, tensor_format, inputs, outputs, parameter.role.name))
    jobs.notes += _notes(source, plan, jobs)
    return jobs


def dequantizing_jobs(source: Source, model: ModelConfig) -> Jobs:
    """INT4, INT8, FP8 or FP4 back to bf16, by what the source's quantization_config says and what lies on the disk."""
    quantization = nested_quantization_config(source.config)
    plan = PrecisionPlan.from_quantization_config(model, quantization)
    check(source, plan, "convert.source")
    if quantization is None:
        raise UserError(
            f"{source.folder} has no quantization_config: it is not quantized, there is nothing to bring back to bf16",
            key="convert.source",
            fix="choose the format to convert to, for example precision=int4_qat",
        )
    target = plan.reread(None)
    jobs = Jobs({shard: [] for shard in source.shards})
    used: set[str] = set()
    stored_plain: list[str] = []
    for name, parameter in plan.parameters.items():
        inputs = inputs_of(source, name, plan.tensors[name])
        used.update(tensor.name for tensor in inputs)
        if is_plain(inputs, name):
            if plan.tensors[name].quantized:
                stored_plain.append(name)
            jobs.add(_copy(inputs[0], parameter, target))
            continue
        outputs = _placed((Part(name, torch.bfloat16, parameter.shape),), target)
        jobs.add(Job(name, Action.decode, plan.tensors[name], inputs, outputs, parameter.role.name))
    if stored_plain:
        jobs.notes.append(f"{len(stored_plain)} weights that quantization_config covers lie in bf16: {shorten(stored_plain)}")
    dropped = [name for name in source.tensors if name not in used and is_activation_part(name)]
    if dropped:
        jobs.notes.append(f"{len(dropped)} activation scales left out: {shorten(dropped)}")
    for name in source.tensors.keys() - used - set(dropped):
        jobs.add(_copy(source.tensors[name], None, target))
    if not any(job.action is Action.decode for job in jobs):
        raise UserError(f"{source.folder} names a quantization_config, but no weight in it is quantized")
    for name in jobs.shards:
        jobs.shards[name].sort(key=lambda job: job.name)
    jobs.notes += _notes(source, plan, jobs)
    return jobs


def _copy(stored: StoredTensor, parameter: Parameter | None, target: PrecisionPlan) -> Job:
    outputs = _placed((Part(stored.name, stored.dtype, stored.shape),), target)
    role = parameter.role.name if parameter else "tied lm_head"
    return Job(stored.name, Action.copy, TensorFormat.bf16(), (stored,), outputs, role)


def reader_notes(plan: PrecisionPlan) -> list[str]:
    """Programs that read the written format wrongly."""
    if any(parameter.stack for parameter in plan.parameters.values()) and not plan.in_stacks:
        return ["experts were written one by one: transformers reads those of this family in one tensor per projection only"]
    written = {t.format: t for name, t in plan.quantized.items() if plan.parameters[name].role is Role.routed_expert}
    return [note for tensor_format in written.values() if (note := tensor_format.spec.expert_note)]


def _notes(source: Source, plan: PrecisionPlan, jobs: Jobs) -> list[str]:
    """A copied lm_head, what was left out, and weights in another dtype than the rest."""
    notes = [f"{name}, which is tied to the embedding, was copied" for name in source.tensors if plan.ties(name)]
    if stray := source.stray_shards():
        notes.append(f"{len(stray)} safetensors files that the index does not name were left out: {shorten(stray)}")
    if others := source.other_weights():
        notes.append(f"{len(others)} files with weights in another form were left out: {shorten(others)}")
    if not source.named:
        notes.append(f"the source has no {INDEX}; the target gets one")
    return notes + _dtype_notes(jobs)


def _dtype_notes(jobs: Jobs) -> list[str]:
    """Unquantized weights keep their dtype; where that is not bf16, the written folder mixes it with what was made here."""
    kept: dict[torch.dtype, list[str]] = {}
    made: set[torch.dtype] = set()
    for job in jobs:
        if job.action is not Action.copy:
            made.update(part.dtype for part in job.outputs)
        elif job.name.endswith(".weight") and job.outputs[0].dtype is not torch.bfloat16:
            kept.setdefault(job.outputs[0].dtype, []).append(job.name)
    beside = ", ".join(sorted(_plain(dtype) for dtype in made if dtype.is_floating_point and dtype.itemsize > 1))
    return [
        f"{len(names)} weights stay in {_plain(dtype)}, as the source has them"
        + (f", beside {beside} of what was converted" if beside and beside != _plain(dtype) else "")
        + f": {shorten(names)}"
        for dtype, names in kept.items()
    ]


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
