"""`python -m runner audit`: two checkpoint folders, or a folder and a config.

    python -m runner audit DIR DIR                      same quantized set, same grids, same bits
    python -m runner audit DIR precision=int4_qat ...   does the folder hold what a run with this config expects

Prints every difference and returns 1 when there is one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from runner.errors import UserError
from runner.models import family_of
from runner.precision.audit import audit, audit_checkpoint, compare_checkpoints, quantization_config_of
from runner.precision.plan import PrecisionPlan, quantized_roles
from runner.precision.quantization_config import nested_quantization_config
from runner.precision.tensor_format import TensorFormat
from runner.schema import ModelConfig

USAGE = "python -m runner audit DIR DIR, or python -m runner audit DIR precision=int4_qat [key=value ...]"
SHOWN = 40  # differences of single tensors that are printed; all are counted


def main(argv: list[str]) -> int:
    """0 when the sides agree, 1 with one line per difference; UserError for folders that cannot be read."""
    folders = [Path(word).expanduser() for word in argv if "=" not in word]
    overrides = [word for word in argv if "=" in word]
    if overrides and len(folders) == 1:
        title, found = against_config(folders[0], overrides)
    elif not overrides and len(folders) == 2:
        title, found = two_folders(folders[0], folders[1])
    else:
        raise UserError(f"audit takes two folders, or a folder and a config; got {' '.join(argv) or 'nothing'}", fix=USAGE)
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


def against_config(folder: Path, overrides: list[str]) -> tuple[str, list[str]]:
    """A folder against the rollout side of a config's precision; the model is the folder's own."""
    from runner import compose
    from runner.convert.grid import with_groups_of

    precision = compose.load(overrides, check_rules=False).config.precision
    model = _model(folder)
    tensor_format, chosen = with_groups_of(TensorFormat.of(precision.rollout), model, precision, overrides)
    plan = PrecisionPlan.with_format(model, tensor_format, quantized_roles(model, precision))
    title = f"{folder} against precision={precision.name}: {plan.summary()}" + (f"\n({chosen})" if chosen else "")
    broken = _broken(folder, model)
    return title, broken or audit_checkpoint(plan, folder, str(folder), partial(family_of(model).unused, model))


def _broken(folder: Path, model: ModelConfig) -> list[str]:
    """Where a folder's tensors differ from its own config.json: then they cannot be compared with anything else."""
    from runner.convert.source import open_source, without_unused
    from runner.convert.stored import problems

    source, _ = without_unused(open_source(folder), model)
    try:
        own = PrecisionPlan.from_quantization_config(model, nested_quantization_config(source.config))
    except UserError:  # which the audit says as a difference
        return []
    return [f"{folder}: {problem.problem}" for problem in problems(source, own, "")]


def _model(folder: Path) -> ModelConfig:
    from runner.convert.source import model_of, open_source

    return model_of(open_source(folder))
