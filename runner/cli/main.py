"""From a command line to its verb. A verb is a file of this folder, and a line of VERBS."""

from __future__ import annotations

import difflib

from runner import PROGRAM
from runner.cli import audit, convert, doctor, export, plan, read, report, run, submit, sweep, watch
from runner.cli.show import asks_for_completion, complete, shown, with_info
from runner.cli.verb import columns, examples, help_of, parse
from runner.errors import UserError

MODULES = (run, plan, submit, sweep, report, watch, read, doctor, convert, export, audit)
VERBS = {module.VERB.name: module.VERB for module in MODULES}


def dispatch(argv: list[str]) -> int:
    """Do what the command line says; returns the exit code. Raises UserError and UserErrors."""
    if asks_for_completion(argv):
        complete(argv, VERBS)
        return 0
    named = bool(argv) and argv[0] in VERBS
    if not named and argv and "=" not in argv[0] and not argv[0].startswith(("-", "~")):
        close = difflib.get_close_matches(argv[0], VERBS, n=1)
        listed = f"the verbs are {', '.join(VERBS)}; everything else is key=value"
        raise UserError(f"{argv[0]!r} is neither a verb nor key=value", fix=f"did you mean {close[0]}?" if close else listed)
    verb = VERBS[argv[0] if named else "run"]
    command = parse(verb, with_info(argv[1:] if named else argv), VERBS.values())
    if command.flags.help:
        print(help_of(verb, groups_text) if named else help_text())
    elif command.flags.version:
        from runner.provenance import version_line

        print(version_line())
    elif not shown(command):
        return verb.start(command)
    return 0


def help_text() -> str:
    """The text of `runner --help`: verbs, a command of each to copy, and every group with its options."""
    lines = ["Low-precision reinforcement learning of language models from one YAML composition.", ""]
    lines += [f"usage: {PROGRAM} [VERB] [key=value ...]", "", "verbs"]
    lines += columns((name, verb.summary) for name, verb in VERBS.items())
    commands = [*VERBS["run"].examples, *(verb.examples[0] for verb in VERBS.values() if verb.name != "run")]
    lines += ["", "examples", *examples(commands), "", groups_text(), "", "flags"]
    lines += columns(
        [
            ("VERB --help", "what that verb takes, with more examples"),
            ("--cfg job [--resolve] [--package KEY]", "print the composed config and stop"),
            ("--version", "the version of runner and its commit"),
            ("-sc install=bash", 'Tab completion: eval "$(runner -sc install=bash)"'),
        ]
    )
    return "\n".join(lines)


def groups_text() -> str:
    """Every group of the config with its options, read off conf/."""
    from runner.config.searchpath import groups

    rows = columns((group, ", ".join(options)) for group, options in groups().items())
    return "\n".join(["groups: GROUP=OPTION, then any key below it: GROUP.key=value", *rows])
