"""`doctor engine`: recover the weights an engine really computes with, through its own kernels, and compare them with the plan.

One-hot inputs return the effective weight, whatever layout the kernel keeps it in: row i of kernel(identity) is column i of the
weight. A kernel that rounds integer * scale to bf16 and one that keeps it in fp32 look alike there, because the output is bf16;
two-hot inputs tell them apart: e_i - e_j returns bf16(p_i - p_j), where cancellation brings up the bits that a rounded product
has lost. Under `exact` both are the same number, and the kernel must return it; under the other conventions the observed rounding
must be the one that the engine declares.

Two parts. Kernels: one weight of every role and shape in every format. The run's engine: the whole model, started and synced as a
run does it, every matrix recovered by its HF name, so that a wrong stacking or a forgotten layer shows.

Shape legend: weights [N, K] (out, in), inputs [M, K], outputs [M, N].
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from hydra.utils import get_class
from rich.console import Console

from runner.config import option as options
from runner.config.schema import Config, Convention, ModelConfig, Role
from runner.data import ExportedTensor, WeightStream
from runner.doctor.table import show
from runner.errors import UserError
from runner.findings import Finding, Status
from runner.models import family_of
from runner.precision import fp4
from runner.precision.codec import decode, encode, integers, scales_of
from runner.precision.formats import all_formats
from runner.precision.plan import NEVER_QUANTIZED, PrecisionPlan, shorten
from runner.precision.tensor_format import TensorFormat
from runner.rollout.audit import audit_engine
from runner.rollout.protocol import EngineDescription, SyncReport

GROUP_SIZES = (32, 64, 128, 256)
ALL_COLUMNS = 1024  # up to this many input columns are all probed; of more, this many spread evenly
ROWS_AT_A_TIME = (1, 8, 64)  # kernels take other paths for one row, a few and many


class Kernel(Protocol):
    """One weight as an engine holds it."""

    kind: str  # "int4_kernel", ...: shown in the table
    product_rounding: str  # declared: "fp32" or "bf16"

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] -> x @ W.T [M, N] in bf16, through the kernel that generation uses."""
        ...


class EngineProbe(Protocol):
    """What `doctor engine` needs of an engine. Its option names it as `probe`."""

    name: str
    device: torch.device

    def kernel(self, exported: ExportedTensor, shape: tuple[int, int], tensor_format: TensorFormat) -> Kernel:
        """Load one weight the way a weight sync does."""
        ...

    def pool(self, cfg: Config) -> ProbedPool | None:
        """The engine of this config with dummy weights, or None where this machine should not hold the whole model."""
        ...


class ProbedPool(Protocol):
    """The part of a rollout pool that the whole-engine proof uses."""

    def update_weights(self, version: int, stream: WeightStream) -> SyncReport: ...

    def effective_weight(self, name: str) -> torch.Tensor:
        """[N, K] of one on-disk weight, recovered by one-hot inputs; raises UserError for a name the engine does not have."""
        ...

    def describe(self) -> list[EngineDescription]: ...

    def close(self) -> None: ...


def probe_for(cfg: Config) -> EngineProbe:
    target = options.option_of(cfg.rollout).probe
    if target is None:
        there = [choice for choice in options.choices() if choice.option.probe]
        raise UserError(
            f"the engine of rollout={cfg.rollout.name} has no probe yet; there are: {', '.join(choice.name for choice in there)}",
            key="rollout",
            fix=f"python -m runner doctor engine {there[0]}",
        )
    probe: EngineProbe = get_class(target)(cfg)
    return probe


def probed_formats() -> list[TensorFormat]:
    """Every format a rollout can ask for, integers in every convention and kernel group size."""
    return [
        TensorFormat.named(spec.name, group, convention)
        for spec in all_formats()
        if not spec.converter_only
        for convention in (Convention if spec.integer else (None,))
        for group in (GROUP_SIZES if spec.group_sizes else (-1,))
    ]


def probed_weights(model: ModelConfig) -> list[tuple[Role, str, tuple[int, int]]]:
    """(role, on-disk name, shape): the first weight of every role and shape that may be quantized."""
    found: dict[tuple[Role, tuple[int, int]], str] = {}
    for parameter in family_of(model).parameters(model):
        if parameter.role in NEVER_QUANTIZED or len(parameter.shape) != 2:
            continue
        rows, columns = parameter.shape
        found.setdefault((parameter.role, (rows, columns)), parameter.name)
    return [(role, name, shape) for (role, shape), name in found.items()]


def check_engine(cfg: Config, console: Console) -> int:
    """Probe every role and format, print the table; 1 when an engine computes with other weights than the plan, else 0."""
    probe = probe_for(cfg)
    title = f"Effective weights of the {probe.name} engine on {probe.device}, recovered through its kernels ({cfg.model.name})"
    return show(title, itertools.chain(kernel_findings(cfg.model, probe), run_findings(cfg, probe)), console)


def run_findings(cfg: Config, probe: EngineProbe) -> Iterator[Finding]:
    """Sync random weights into the engine of this config, then recover every matrix and compare it with the plan."""
    pool = probe.pool(cfg)
    if pool is None:
        yield Finding(
            "whole engine", Status.ok, f"not started: {cfg.model.name} is not a toy model; scale=laptop starts its twin"
        )
        return
    plan = PrecisionPlan.build(cfg.model, cfg.precision, "rollout")
    try:
        report = pool.update_weights(0, random_stream(plan))
        if report.problems:
            yield Finding(
                "weight sync", Status.fail, "; ".join(report.problems[:5]), "see runner/weights: the sync lost or changed bits"
            )
            return
        yield Finding(
            "weight sync",
            Status.ok,
            f"{report.arrived} tensors arrived, {report.resident_checked} compared with what is resident",
        )
        yield from recovered_findings(pool, plan)
        differing = [problem for engine in pool.describe() for problem in audit_engine(plan, engine)]
        found = "; ".join(differing) or f"the engine names the plan's formats for all {len(plan.tensors)} weights"
        status = Status.fail if differing else Status.ok
        yield Finding("declared formats", status, found, "runner/precision/plan.py is the single source" if differing else "")
    finally:
        pool.close()


def random_stream(plan: PrecisionPlan) -> WeightStream:
    """Every weight of the model, random by its name (two equal weights could be swapped unseen), in its format."""
    for name, parameter in plan.parameters.items():
        if len(parameter.shape) == 2:
            weight = random_weight(*parameter.shape, seed=zlib.crc32(name.encode()))
        else:
            weight = torch.ones(parameter.shape, dtype=torch.bfloat16)
        yield encode(name, weight, plan.format_of(name))


def recovered_findings(pool: ProbedPool, plan: PrecisionPlan) -> Iterator[Finding]:
    """One line per role and format; a difference names the tensor."""
    results: dict[str, tuple[int, list[str]]] = {}
    for exported in random_stream(plan):
        parameter, tensor_format = plan.parameters[exported.name], plan.format_of(exported.name)
        if len(parameter.shape) != 2:
            continue
        expected, got = decode(exported, tensor_format).float(), pool.effective_weight(exported.name).float().cpu()
        count, wrong = results.get(f"engine: {parameter.role.name} {tensor_format}", (0, []))
        if expected.shape != got.shape or not torch.equal(expected, got):
            wrong.append(exported.name)
        results[f"engine: {parameter.role.name} {tensor_format}"] = (count + 1, wrong)
    for label, (count, wrong) in results.items():
        if wrong:
            fix = "the engine computes with other weights than the trainer: do not train against it"
            yield Finding(label, Status.fail, f"{len(wrong)} of {count} weights differ from the plan: {shorten(wrong)}", fix)
        else:
            yield Finding(label, Status.ok, f"{count} weights recovered, equal bit for bit")


def kernel_findings(model: ModelConfig, probe: EngineProbe) -> Iterator[Finding]:
    for role, name, shape in probed_weights(model):
        for tensor_format in probed_formats():
            yield check_weight(probe, role, name, shape, tensor_format)


def check_weight(probe: EngineProbe, role: Role, name: str, shape: tuple[int, int], tensor_format: TensorFormat) -> Finding:
    """Load one random weight, recover it, compare. A shape the grid does not divide is probed with a wider input."""
    rows, columns = shape
    if tensor_format.strategy == "group" and columns % tensor_format.group_size:
        columns = -(-columns // tensor_format.group_size) * tensor_format.group_size
    label = f"{role.name} {tensor_format} [{rows}, {columns}]"
    exported = encode(name, random_weight(rows, columns), tensor_format)
    kernel = probe.kernel(exported, (rows, columns), tensor_format)
    expected = decode(exported, tensor_format)
    problems = one_hot_problems(kernel, expected, probe.device)
    verdict = two_hot(kernel, exported, tensor_format, expected, probe.device)
    if verdict.problem:
        problems.append(verdict.problem)
    if problems:
        fix = "the engine repacks or multiplies differently from runner/precision: do not train against it in this format"
        return Finding(label, Status.fail, f"{name} ({kernel.kind}): {'; '.join(problems)}", fix)
    return Finding(label, Status.ok, f"{kernel.kind}: one-hot equal bit for bit; {verdict.text}")


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """bf16 [N, K] that meets the corners of every grid: rows of very different size, outliers, signs, an all-zero group."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight *= torch.exp2(torch.randint(-6, 7, (rows, 1), generator=generator).float())
    outliers = torch.rand(rows, columns, generator=generator) < 1e-3
    weight = torch.where(outliers, weight * 20, weight)
    weight[0, : min(256, columns)] = 0
    return weight.to(torch.bfloat16)


def probed_columns(columns: int) -> torch.Tensor:
    """Indices of the input columns that are probed, ascending."""
    if columns <= ALL_COLUMNS:
        return torch.arange(columns)
    return torch.linspace(0, columns - 1, ALL_COLUMNS).round().long().unique()


def hot_inputs(pairs: list[tuple[torch.Tensor, float]], columns: int, device: torch.device) -> torch.Tensor:
    """bf16 [M, K] with, in row m, value v at index[m] for every (index [M], v)."""
    x = torch.zeros(len(pairs[0][0]), columns, dtype=torch.bfloat16)
    for index, value in pairs:
        x[torch.arange(len(index)), index] = value
    return x.to(device)


def one_hot_problems(kernel: Kernel, expected: torch.Tensor, device: torch.device) -> list[str]:
    """Compare the recovered weight with the plan's, bit for bit (a zero's sign aside), for every number of rows at a time."""
    columns = probed_columns(expected.shape[1])
    wanted = expected[:, columns].float()
    problems = []
    for rows in ROWS_AT_A_TIME:
        chosen = columns if rows == max(ROWS_AT_A_TIME) else columns[: 4 * rows]
        inputs = hot_inputs([(chosen, 1.0)], expected.shape[1], device)
        got = torch.cat([kernel.linear(part) for part in inputs.split(rows)]).T.float().cpu()
        wrong = got != wanted[:, : len(chosen)]
        if wrong.any():
            out, position = (int(i) for i in wrong.nonzero()[0])
            value, right = float(got[out, position]), float(wanted[out, position])
            place = f"[{out}, {int(chosen[position])}] is {value:.6g}, the plan says {right:.6g}"
            problems.append(f"{int(wrong.sum())} of {wrong.numel()} weights differ at {rows} rows: {place}")
    return problems


@dataclass(frozen=True)
class TwoHot:
    """`text` for the table; `problem` is empty when the kernel does what it declares."""

    text: str
    problem: str = ""


def two_hot(
    kernel: Kernel, exported: ExportedTensor, tensor_format: TensorFormat, expected: torch.Tensor, device: torch.device
) -> TwoHot:
    """Which rounding of integer * scale explains e_i - e_j on every output: fp32 products, bf16 products, or neither."""
    columns = probed_columns(expected.shape[1])
    other = columns.roll(len(columns) // 2 + 1)
    inputs = hot_inputs([(columns, 1.0), (other, -1.0)], expected.shape[1], device)
    rows = max(ROWS_AT_A_TIME)
    got = torch.cat([kernel.linear(part) for part in inputs.split(rows)]).T.float().cpu()  # [N, M]
    rounded = expected.float()
    full = fp32_products(exported, tensor_format, expected)
    by_rounded = (rounded[:, columns] - rounded[:, other]).to(torch.bfloat16).float()
    by_full = (full[:, columns] - full[:, other]).to(torch.bfloat16).float()
    telling = by_rounded != by_full
    if torch.equal(got, by_rounded) and not telling.any():
        return TwoHot("two-hot equal" + (", every product exact in bf16" if _has_products(tensor_format) else ""))
    share = f"{float(telling.float().mean()):.0%} of pairs tell"
    observed = "bf16" if torch.equal(got, by_rounded) else "fp32" if torch.equal(got, by_full) else ""
    if not observed:
        wrong = int(((got != by_rounded) & (got != by_full)).sum())
        return TwoHot("", f"two-hot: {wrong} of {got.numel()} sums are explained by neither fp32 nor bf16 products")
    if observed != kernel.product_rounding:
        return TwoHot("", f"products are rounded to {observed}, the engine declares {kernel.product_rounding} ({share})")
    return TwoHot(f"two-hot: {observed} products, as declared ({share})")


def fp32_products(exported: ExportedTensor, tensor_format: TensorFormat, expected: torch.Tensor) -> torch.Tensor:
    """[N, K] fp32: integer, or FP4 value under a power of two, times scale without the rounding to bf16; other formats are
    decoded to bf16 first."""
    if not _has_products(tensor_format):
        return expected.float()
    q, scale = integers(exported, tensor_format), scales_of(exported).scale
    if not tensor_format.integer:
        q, scale = fp4.decode_fp4(q), fp4.e8m0_to_float(scale)
    grouped = q.float().unflatten(-1, (scale.shape[-1], -1))
    return (grouped * scale.float().unsqueeze(-1)).flatten(-2)


def _has_products(tensor_format: TensorFormat) -> bool:
    """Whether each weight is a value times one scale of its group, exact in fp32."""
    return tensor_format.integer or tensor_format.scale_dtype == "e8m0"
