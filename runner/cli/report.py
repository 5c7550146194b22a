"""`python -m runner report RUN [RUN ...]`: report.html of a run, or a page over several."""

from __future__ import annotations

from pathlib import Path

from runner import PROGRAM
from runner.cli.verb import Command, Parser, Verb
from runner.errors import UserError


def start(command: Command) -> int:
    if not command.words:
        raise UserError("report needs a run", fix=f"{PROGRAM} report outputs/<run>")
    from runner.tracking.report import find_runs, write_comparison, write_report

    folders = list(dict.fromkeys(folder for target in command.words for folder in find_runs(target)))
    if len(folders) == 1 and command.flags.out is None:
        print(write_report(folders[0]))
    else:
        out = command.flags.out or folders[0].parent / "comparison.html"
        print(write_comparison(folders, out, "Comparison" if len(command.words) > 1 else Path(command.words[0]).name))
    return 0


def flags(parser: Parser) -> None:
    parser.flag("--out", metavar="FILE", type=Path, help="file of the comparison; default: comparison.html beside the first run")


VERB = Verb(
    name="report",
    summary="report.html of a run, or a comparison of several",
    usage="RUN [RUN ...] [--out FILE]",
    about="""report RUN           rewrite that run's report.html
report RUN RUN ...   one page that lays the runs over each other
report SWEEP         the same for every job of a sweep's folder
RUN is a run's folder, or its name under outputs/. Prints the path of the page. Exit code 0: written; 2: no such run.""",
    examples=(
        ("report outputs/<run>", "one run"),
        ("report outputs/<run> outputs/<other> --out both.html", "compare"),
    ),
    start=start,
    words=None,
    config=False,
    flags=flags,
)
