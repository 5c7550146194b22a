"""Two checkpoint folders, or a folder and a config: every difference in what is quantized, how, and in the bits."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from runner.config.schema import ModelConfig, PrecisionConfig
from runner.convert.compare import audit_checkpoint, compare_checkpoints, quantization_config_of
from runner.convert.grid import with_groups_of
from runner.convert.source import model_of, of_model, one_by_one, open_source
from runner.convert.stored import problems
from runner.errors import UserError
from runner.precision.audit import audit
from runner.precision.plan import PrecisionPlan, quantized_roles
from runner.precision.quantization_config import nested_quantization_config
from runner.precision.tensor_format import TensorFormat

SHOWN = 40  # differences of single tensors that are printed; all are counted


def show(title: str, found: list[str]) -> int:
    """Print the differences; 0 when there is none, else 1."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(title, markup=False)
    for problem in found[:SHOWN]:
        console.print(f"  {problem}", markup=False)
    if len(found) > SHOWN:
        console.print(f"  and {len(found) - SHOWN} more")
    console.print(f"{len(found)} differences" if found else "no differences")
    return 1 if found else 0


def two_folders(a: Path, b: Path) -> tuple[str, list[str]]:
    """Sets and grids first, a line for each kind of difference; then, where both agree, every tensor bit for bit."""
    names = (str(a), str(b))
    models = [_model(folder) for folder in (a, b)]
    plans = [
        PrecisionPlan.from_quantization_config(model, quantization_config_of(folder))
        for model, folder in zip(models, (a, b), strict=True)
    ]
    found = audit((names[0], plans[0]), (names[1], plans[1]))
    found += [problem for folder, model in zip((a, b), models, strict=True) for problem in _broken(folder, model)]
    title = f"{a}: {plans[0].summary()}\n{b}: {plans[1].summary()}"
    if found:  # bits of different grids say nothing more
        return title, found
    with Progress(console=Console(stderr=True), transient=True) as bar:
        bar.add_task("comparing every tensor", total=None)
        return title, compare_checkpoints(a, b)


def against_config(folder: Path, precision: PrecisionConfig, overrides: list[str]) -> tuple[str, list[str]]:
    """A folder against the rollout side of `precision`; the model is the folder's own, and so is a group size that `overrides`
    (what the user typed) do not name."""
    model = _model(folder)
    tensor_format, chosen = with_groups_of(TensorFormat.of(precision.rollout), model, precision, overrides)
    plan = PrecisionPlan.with_format(model, tensor_format, quantized_roles(model, precision))
    title = f"{folder} against precision={precision.name}: {plan.summary()}" + (f"\n({chosen})" if chosen else "")
    opened = one_by_one(open_source(folder), plan.parameters.values())
    unused = opened.tensors.keys() - of_model(opened, model)[0].tensors.keys()
    return title, _broken(folder, model) or audit_checkpoint(plan, folder, str(folder), unused)


def _broken(folder: Path, model: ModelConfig) -> list[str]:
    """Where a folder's tensors differ from its own config.json: then they cannot be compared with anything else."""
    source, _ = of_model(open_source(folder), model)
    try:
        own = PrecisionPlan.from_quantization_config(model, nested_quantization_config(source.config))
    except UserError:  # which the audit says as a difference
        return []
    return [f"{folder}: {problem.problem}" for problem in problems(source, own, "")]


def _model(folder: Path) -> ModelConfig:
    return model_of(open_source(folder))
