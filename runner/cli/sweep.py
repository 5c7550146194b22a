"""`python -m runner sweep`: see runner/sweep."""

from __future__ import annotations

from runner import sweep
from runner.cli.verb import Command, Verb


def start(command: Command) -> int:
    return sweep.run(sweep.sweep_overrides(command.overrides, multirun=True) or [])


VERB = Verb(
    name="sweep",
    summary="every combination of key=a,b,c, one fresh process per job; restartable",
    usage="[key=a,b,c ...] [key=value ...]",
    about="""Every combination of the values of key=a,b,c runs in a process and a folder of its own, one after the other. The same
command again goes on where the sweep stopped: completed jobs are skipped. `python -m runner -m` is the same.
Writes summary.md, summary.csv and comparison.html. Exit code 0: every job completed; 1: one did not; 130: Ctrl-C.""",
    examples=(
        ("sweep precision.group_size=32,64,128", "three jobs and a summary table"),
        ("sweep precision=bf16,int4_qat seed=1,2,3", "six jobs; means over the seeds, too"),
        ("sweep recipe=laptop_r3", "a recipe that is a sweep (`run` starts it as well)"),
    ),
    start=start,
    groups=True,
)
