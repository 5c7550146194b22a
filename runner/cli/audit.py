"""`python -m runner audit DIR DIR`, or `audit DIR precision=...`: do two checkpoints, or a checkpoint and a config, agree."""

from __future__ import annotations

from pathlib import Path

from runner import PROGRAM
from runner.cli.verb import Command, Verb
from runner.errors import UserError


def start(command: Command) -> int:
    folders = [Path(word).expanduser() for word in command.words]
    if len(folders) != (1 if command.overrides else 2):
        typed = " ".join([*command.words, *command.overrides]) or "nothing"
        fix = f"{PROGRAM} audit {VERB.usage}"
        raise UserError(f"audit takes two folders, or a folder and a config; got {typed}", fix=fix)
    from runner.config import compose
    from runner.convert import audit

    if command.overrides:
        precision = compose.load(command.overrides, check_rules=False).config.precision
        return audit.show(*audit.against_config(folders[0], precision, command.overrides))
    return audit.show(*audit.two_folders(*folders))


VERB = Verb(
    name="audit",
    summary="compare what is quantized, and how, in two checkpoints",
    usage="DIR DIR, or DIR precision=int4_qat [key=value ...]",
    about="""audit DIR DIR             same quantized set, same grids, same bits
audit DIR precision=...   does the folder hold what a run with this config expects
Exit code 0: they agree; 1: every difference is printed; 2: a folder that cannot be read, or another mistake to mend.""",
    examples=(
        ("audit DIR DIR", "two checkpoints"),
        ("audit DIR precision=int4_qat precision.group_size=32", "a checkpoint against a config"),
    ),
    start=start,
    words=None,
)
