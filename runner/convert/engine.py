"""Streams a checkpoint into another format, shard by shard.

One source shard is open at a time, mapped and not read whole; its weights are converted by several threads (torch and the
compiled kernels release the GIL) in row blocks, and every result goes straight to its place in the output file. So memory
stays near one shard's mapping plus a few row blocks per worker, whatever the model's size.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from runner.config.schema import ModelConfig, Role
from runner.convert.jobs import Action, Job, Jobs, dequantizing_jobs, quantizing_jobs
from runner.convert.journal import Partial, check_space
from runner.convert.shard import ShardWriter
from runner.convert.source import INDEX, Source, model_of, of_model, open_shard, open_source, read
from runner.convert.stored import check_scales
from runner.data import ExportedTensor
from runner.errors import UserError
from runner.models.config_file import CONFIG
from runner.precision import codec, int4, kernels
from runner.precision.plan import PrecisionPlan
from runner.precision.quantization_config import without_quantization_config
from runner.precision.tensor_format import TensorFormat

LAYOUT_VERSION = 2  # of the written bytes: raise it when a change here would give other bytes for the same identity
BLOCK_BYTES = 4 << 20  # of a weight that one worker converts at a time
SPACE_MARGIN = 64 << 20  # for headers, index and the file system's own use

Progress = Callable[[str, int], None]  # (shard, source bytes done since the last call)


@dataclass
class Report:
    """What one conversion did.

    layers   "routed_expert int4 group 32 exact" -> (weights, source bytes, target bytes)
    seconds and read_bytes count this process only; `resumed` shards were done by an earlier one
    """

    target: Path
    layers: dict[str, tuple[int, int, int]]
    notes: list[str]
    seconds: float
    read_bytes: int
    resumed: int
    quantization_config: dict[str, Any] | None = field(repr=False, default=None)

    @property
    def gigabytes_per_second(self) -> float:
        return self.read_bytes / 1e9 / self.seconds if self.seconds else 0.0


def convert(
    source: Path,
    target: Path,
    tensor_format: TensorFormat,
    roles: Callable[[ModelConfig], Iterable[Role]],
    *,
    workers: int,
    progress: Progress | None = None,
) -> Report:
    """Write `source` (a checkpoint folder) to `target` with the matrices of `roles` in `tensor_format`.

    bf16 as the format brings a quantized source back. The target appears in one rename when it is complete; until then
    `<target>.partial` holds finished shards, and the same call continues them. Raises UserError, before anything is
    written, for every problem that headers show; NaN and infinite weights are found while converting. The source is
    only read.
    """
    opened = open_source(source)
    model = model_of(opened)
    opened, notes = of_model(opened, model)
    check_apart(source, target)
    jobs, quantization_config = plan_jobs(opened, model, tensor_format, roles)
    jobs.notes += notes
    with Partial(target, identity(opened, jobs)) as partial:
        return write_target(opened, jobs, quantization_config, partial, workers=workers, progress=progress)


def write_target(
    source: Source,
    jobs: Jobs,
    quantization_config: dict[str, Any] | None,
    partial: Partial,
    *,
    workers: int,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> Report:
    """Do the jobs that the partial folder has not done yet, and publish it; `check` may refuse the finished folder."""
    started = time.perf_counter()
    others = source.other_files()
    needed = sum(job.output_bytes for job in jobs) + sum((source.folder / path).stat().st_size for path in others)
    check_space(partial.folder, needed - sum(partial.done.values()) + SPACE_MARGIN)
    resumed = len(partial.done)
    read = 0
    _load_kernels(jobs)
    with _one_thread_per_operator(), ThreadPoolExecutor(workers) as pool:
        for shard, work in jobs.shards.items():
            size = sum(job.input_bytes for job in work)
            if shard in partial.done:
                if progress:
                    progress(shard, size)
                continue
            if work:
                written = _convert_shard(source, partial.folder / shard, work, pool, workers, progress)
                partial.finish(shard, written)
            read += size
    _copy_others(source.folder, partial.folder, others)
    _write_index(source, jobs, partial.folder)
    _write_config(source, quantization_config, partial.folder)
    if check:
        check(partial.folder)
    partial.publish()
    seconds = time.perf_counter() - started
    return Report(partial.target, _layers(jobs), jobs.notes, seconds, read, resumed, quantization_config)


def plan_jobs(
    source: Source, model: ModelConfig, tensor_format: TensorFormat, roles: Callable[[ModelConfig], Iterable[Role]]
) -> tuple[Jobs, dict[str, Any] | None]:
    """The work, and the `quantization_config` of the target."""
    if not tensor_format.quantized:
        return dequantizing_jobs(source, model), None
    plan = PrecisionPlan.with_format(model, tensor_format, roles(model))
    return quantizing_jobs(source, plan), plan.quantization_config()


def check_apart(source: Path, target: Path) -> None:
    """UserError unless the target, and the unfinished target beside it, have nothing to do with the source."""
    if target.name in ("", ".."):
        raise UserError(f"{target} is no folder to be made", key="convert.target", fix="target=<a folder to be made>")
    inside = source.resolve()
    for folder in (target.resolve(), target.with_name(f"{target.name}.partial").resolve()):
        if folder.is_relative_to(inside):
            raise UserError(f"the target {target} lies inside the source", key="convert.target", fix="give another target")
        if inside.is_relative_to(folder):
            raise UserError(f"the source lies inside {folder}, which is to be written", key="convert.target", fix="move it")


def identity(source: Source, jobs: Jobs) -> dict[str, Any]:
    """What the target's bytes depend on: the source's files and the format of each weight."""
    formats_used = Counter(f"{job.action.name} {job.role} {job.tensor_format}" for job in jobs)
    stats = {shard: (source.folder / shard).stat() for shard in source.shards}
    return {
        "layout": LAYOUT_VERSION,
        "source": str(source.folder.resolve()),
        "shards": {shard: [stat.st_size, stat.st_mtime_ns] for shard, stat in stats.items()},
        "formats": dict(sorted(formats_used.items())),
    }


def _load_kernels(jobs: Jobs) -> None:
    """Load the compiled INT4 kernels when there is enough to convert to pay for it; same bits with and without."""
    encoded = (job for job in jobs if job.tensor_format.spec.compiled_kernels and job.action is Action.encode)
    if sum(math.prod(job.inputs[0].shape) for job in encoded) >= kernels.FIRST_ELEMENTS:
        kernels.load()


@contextmanager
def _one_thread_per_operator() -> Iterator[None]:
    """The workers are the parallelism; operators that start threads of their own would fight over the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _convert_shard(
    source: Source, path: Path, work: list[Job], pool: ThreadPoolExecutor, workers: int, progress: Progress | None
) -> int:
    """Convert all jobs of one output file; returns its size in bytes."""
    writer = ShardWriter(path, [part for job in work for part in job.outputs])
    complete = False
    try:
        with ExitStack() as stack:
            # parts of a quantized weight may lie in another shard than its first one
            shards = {tensor.shard for job in work for tensor in job.inputs}
            handles = {shard: stack.enter_context(open_shard(source.folder / shard)) for shard in shards}

            def run(job: Job) -> None:
                _convert_job(job, [read(handles[tensor.shard], tensor) for tensor in job.inputs], writer)
                if progress:
                    progress(path.name, job.input_bytes)

            # the biggest first, so that no worker is left alone with it at the end
            queue = sorted(work, key=lambda job: -job.input_bytes)
            futures = [pool.submit(run, job) for job in queue]
            done, pending = wait(futures, return_when=FIRST_EXCEPTION)
            for future in pending:
                future.cancel()
            wait(pending)
            failed = [error for future in done if (error := future.exception()) is not None]
            if failed:
                raise failed[0]
        complete = True
    finally:
        writer.close(complete=complete)
    return writer.num_bytes


def _convert_job(job: Job, tensors: list[torch.Tensor], writer: ShardWriter) -> None:
    match job.action:
        case Action.copy:
            _check_finite(job.name, tensors[0])
            writer.write(job.name, tensors[0])
        case Action.encode:
            _encode(job, tensors, writer)
        case Action.pack:
            _pack(job, tensors[1], tensors[2], writer)
        case Action.decode:
            _decode(job, {stored.name: tensor for stored, tensor in zip(job.inputs, tensors, strict=True)}, writer)


def _encode(job: Job, tensors: list[torch.Tensor], writer: ShardWriter) -> None:
    """Row block by row block where a row's (or a 128-row block's) result depends on nothing else."""
    weight, rows = tensors[0], _rows_per_block(job.tensor_format, tensors[0])
    fused = {stored.name: tensor for stored, tensor in zip(job.inputs, tensors, strict=True)}
    scales = codec.fused_scales(fused, job.tensor_format).get(job.name)
    for start in range(0, weight.shape[0], rows):
        exported = codec.encode(job.name, weight[start : start + rows], job.tensor_format, scales)
        for name, part in exported.parts.items():
            if name.endswith(".weight_shape"):
                if start == 0:
                    writer.write(name, torch.tensor(weight.shape, dtype=torch.int64))
                continue
            whole = rows >= weight.shape[0]
            first = start // job.tensor_format.rows_per_scale if ".weight_scale" in name else start
            writer.write(name, part, None if whole else first)


def _pack(job: Job, integers: torch.Tensor, scale: torch.Tensor, writer: ShardWriter) -> None:
    """Integers int8 [out, in] and scales bf16 [out, groups] in the packed form of the format, row block by row block."""
    packed, scales, shape = (part.name for part in job.outputs)
    rows = _rows_of(BLOCK_BYTES, integers.shape[1])
    for start in range(0, len(integers), rows):
        writer.write(packed, int4.pack(integers[start : start + rows], job.tensor_format.bits), start)
    writer.write(scales, scale)
    writer.write(shape, torch.tensor(integers.shape, dtype=torch.int64))


def _rows_per_block(tensor_format: TensorFormat, weight: torch.Tensor) -> int:
    if tensor_format.scales_whole_weight:
        return max(weight.shape[0], 1)
    return _rows_of(BLOCK_BYTES, weight.shape[1] * weight.element_size(), tensor_format.rows_per_scale)


def _rows_of(num_bytes: int, row_bytes: int, unit: int = 1) -> int:
    """Rows that fit, a multiple of `unit`."""
    return max(num_bytes // max(row_bytes, 1) // unit * unit, unit)


def _decode(job: Job, parts: dict[str, torch.Tensor], writer: ShardWriter) -> None:
    """Row block by row block, except where zero points are packed along the rows."""
    check_scales(job.name, parts, "convert.source")
    rows, columns = job.outputs[0].shape
    unit = job.tensor_format.rows_per_scale
    step = _rows_of(BLOCK_BYTES, columns * 2, unit) if job.tensor_format.symmetric else rows
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block = parts if step >= rows else {name: _rows(name, part, start, stop, columns, unit) for name, part in parts.items()}
        decoded = codec.decode(ExportedTensor(job.name, job.tensor_format.format, block), job.tensor_format)
        if tuple(decoded.shape) != (stop - start, columns):
            raise UserError(
                f"{job.name} holds {tuple(decoded.shape)} weights where config.json implies {(stop - start, columns)}"
            )
        _check_finite(job.name, decoded)
        writer.write(job.name, decoded, start if step < rows else None)


def _rows(name: str, part: torch.Tensor, start: int, stop: int, columns: int, unit: int) -> torch.Tensor:
    """What rows [start, stop) of a weight need of one of its parts; a scale covers `unit` rows."""
    if name.endswith(".weight_shape"):
        return torch.tensor([stop - start, columns])
    if part.numel() <= 1:  # a scale of the whole tensor
        return part
    if ".weight_scale" in name:  # compressed-tensors' name of block scales lacks the _inv
        return part[start // unit : -(-stop // unit)]
    return part[start:stop]


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    """A NaN in any weight, quantized or not, ends the conversion with its name. aminmax propagates NaN in one pass."""
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64) or not tensor.numel():
        return
    low, high = (float(value) for value in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        kind = "NaN" if math.isnan(low) or math.isnan(high) else "infinite"
        raise UserError(f"{name} holds {kind} values", key="convert.source", fix="the checkpoint is damaged or diverged")


def _copy_others(source: Path, folder: Path, others: list[Path]) -> None:
    for path in others:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).unlink(missing_ok=True)
        shutil.copy2(source / path, folder / path)


def _write_index(source: Source, jobs: Jobs, folder: Path) -> None:
    if not source.indexed:
        return
    placed = {part.stored_name: shard for shard, work in jobs.shards.items() for job in work for part in job.outputs}
    total = sum(job.output_bytes for job in jobs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_config(source: Source, quantization_config: dict[str, Any] | None, folder: Path) -> None:
    """The source's config.json with the target's quantization_config; the last file, because it makes a checkpoint."""
    config = without_quantization_config(source.config)
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _layers(jobs: Jobs) -> dict[str, tuple[int, int, int]]:
    counts: dict[str, tuple[int, int, int]] = {}
    for job in jobs:
        match job.action:
            case Action.copy:
                key = f"{job.role}: unchanged"
            case Action.encode:
                key = f"{job.role}: {job.tensor_format}"
            case Action.pack:
                key = f"{job.role}: {job.tensor_format}, GPTQ"
            case Action.decode:
                key = f"{job.role}: {job.tensor_format} to bf16"
        weights, before, after = counts.get(key, (0, 0, 0))
        counts[key] = (weights + 1, before + job.input_bytes, after + job.output_bytes)
    return counts
