"""`python -m runner export run=RUN target=DIR [format=...] [step=N] [key=value ...]`: a run's weights as an HF folder."""

from __future__ import annotations

import difflib
from pathlib import Path

from runner.cli.verb import Command, Verb
from runner.errors import UserError, UserErrors


def own_keys() -> dict[str, str]:
    return {
        "run": "the run's folder, or its name under outputs_dir",
        "target": "folder to make",
        "format": f"{', '.join(formats())}; default: the run's rollout format",
        "step": "of a complete checkpoint; default: the newest",
    }


def formats() -> tuple[str, ...]:
    from runner.precision.formats import all_formats
    from runner.trainer.adapters import PEFT

    return (*(spec.name for spec in all_formats() if not spec.converter_only), PEFT)


def start(command: Command) -> int:
    own = command.own
    problems = [_missing(key, command) for key in ("run", "target") if not own.get(key)]
    if own.get("format", "bf16") not in formats():
        problems.append(UserError(f"unknown format {own['format']!r}", key="format", fix=f"format={' or '.join(formats())}"))
    if not own.get("step", "0").isdigit():
        problems.append(UserError(f"{own['step']!r} is not a step", key="step", fix="step=40"))
    target = Path(own.get("target", "")).expanduser()
    if own.get("target") and target.exists():
        problems.append(UserError(f"{target} is already there", key="target", fix="target=<a folder to be made>"))
    if problems:
        raise UserErrors(problems)
    from runner.config import compose
    from runner.config.overrides import expand_home, given, override
    from runner.config.recorded import find_run

    outputs_dir = given(command.overrides, "outputs_dir") or compose.default_outputs_dir()
    run = find_run(expand_home(own["run"]), expand_home(outputs_dir), key="run")
    config = compose.load([*command.overrides, override("resume", str(run))]).config
    from runner.run.export import export

    export(config, run, target, format=own.get("format"), step=int(own["step"]) if "step" in own else None)
    return 0


def _missing(key: str, command: Command) -> UserError:
    meant = [item for item in command.overrides if difflib.get_close_matches(item.partition("=")[0], [key], cutoff=0.75)]
    fix = f"did you mean {key}={meant[0].partition('=')[2]}?" if meant else f"{key}={own_keys()[key]}"
    return UserError(f"export needs {key}=", key=key, fix=fix)


VERB = Verb(
    name="export",
    summary="a run's weights as an HF folder, in bf16 or quantized",
    usage="run=RUN target=DIR [format=FORMAT] [step=N] [key=value ...]",
    about="""Writes what transformers and engines load, from a checkpoint of the run: bf16(master) loses nothing,
and a quantized export has the integers and scales that the run's engine computed with. A Megatron run is loaded by ranks in the
run's own layout, or in another one that the command names.
Exit code 0: written; 1: the ranks were lost; 2: a mistake to mend; 130: Ctrl-C.""",
    examples=(
        ("export run=RUN target=DIR format=int4", "as the engine had it"),
        ("export run=RUN target=DIR format=bf16 step=40", "an earlier checkpoint, unquantized"),
        ("export run=RUN target=DIR format=peft", "a LoRA run's adapters, without the base"),
        ("export run=RUN target=DIR parallelism=single", "a Megatron run, in one process"),
    ),
    start=start,
    own=own_keys,
)
