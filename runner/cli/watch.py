"""`python -m runner watch RUN`: the report in a browser, while the run goes on."""

from __future__ import annotations

from runner import PROGRAM
from runner.cli.verb import Command, Parser, Verb
from runner.errors import UserError

PORT = 8790


def start(command: Command) -> int:
    if len(command.words) != 1:
        raise UserError("watch needs one run", fix=f"{PROGRAM} watch outputs/<run>")
    if not 0 <= command.flags.port < 65536:
        raise UserError(f"{command.flags.port} is no port", key="--port", fix="--port 0 takes a free one")
    from runner.tracking import live
    from runner.tracking.report import find_runs

    (folder, *others) = find_runs(command.words[0])
    if others:
        raise UserError(f"{command.words[0]} is a sweep", fix=f"{PROGRAM} watch {folder}")
    live.serve(folder, command.flags.port, lambda line: print(line, flush=True))
    return 0


def flags(parser: Parser) -> None:
    parser.flag("--port", metavar="N", type=int, default=PORT, help=f"of the loopback; 0: a free one; default: {PORT}")


VERB = Verb(
    name="watch",
    summary="the report of a run in a browser, while it goes on",
    usage="RUN [--port N]",
    about="""watch RUN   serve that run's report on this machine's loopback; it is drawn again when the run writes something
RUN is a run's folder, or its name under outputs/; it may have ended. Shows curves, alarms of the watch rules with their advice, a
timeline of the driver, the trainer's ranks and the engines, and samples token by token. Prints the address, whose token is the
key to it, and goes on until Ctrl-C. Only reads the run's files: the run may be on another machine that writes into this folder.
From afar: ssh -L 8790:127.0.0.1:8790 HOST. Needs aiohttp (pip install 'runner[watch]'). Exit code 0: ended; 2: no such run, a
damaged file, the port is in use.""",
    examples=(
        ("watch outputs/<run>", "open the address that it prints"),
        ("watch outputs/<run> --port 0", "on a free port"),
    ),
    start=start,
    words=None,
    config=False,
    flags=flags,
)
