"""`python -m runner [verb] key=value ...` and the installed `runner` script.

Verbs are dispatched here, before Hydra, which composes the config. Nothing here imports torch or ray: `--cfg job`, `--help`
and every press of Tab start this module.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runner.cores import respect_quota
from runner.errors import UserError, UserErrors

VERBS = {
    "run": "the whole loop (the default verb)",
    "plan": "what goes on which GPU, what fits, what moves; needs no GPU",
    "report": "report.html of a run, or a comparison of several: report RUN [RUN ...]",
    "doctor": "check this machine; doctor engine checks what the engines really compute with",
    "convert": "a checkpoint into INT4, FP8 or FP4, or back: convert source=DIR target=DIR precision=...",
    "export": "a run's weights as an HF folder: export run=RUN target=DIR format=bf16|int4",
    "audit": "compare what is quantized, and how, in two checkpoints: audit DIR DIR",
}
TARGETS = {
    "run": "runner.run:main",
    "plan": "runner.planner.cli:main",
    "report": "runner.tracking.report:main",
    "doctor": "runner.doctor:main",
    "convert": "runner.convert.cli:main",
    "export": "runner.convert.export:main",
    "audit": "runner.precision.audit_cli:main",
    "sweep": "runner.cluster.sweep:main",
}
WORDS = {"doctor": ("machine", "engine")}  # what may follow a verb without a `=`
FLAGS_WITH_VALUE = {"--cfg": "cfg", "-c": "cfg", "--package": "package", "-p": "package"}
FLAGS = {
    "--resolve": "resolve",
    "--info": "info",
    "-i": "info",
    "--help": "help",
    "-h": "help",
    "--multirun": "multirun",
    "-m": "multirun",
    "--version": "version",
}


@dataclass
class Command:
    """A parsed command line. `words` follow the verb and are not overrides."""

    verb: str
    overrides: list[str]
    words: list[str]
    flags: dict[str, str]


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 2 for a mistake of the user, without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    respect_quota()
    try:
        return dispatch(argv)
    except UserErrors as errors:
        count = len(errors.errors)
        print(f"{count} problem{'s' if count > 1 else ''}; nothing was started.\n{errors}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `runner --cfg job | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def dispatch(argv: list[str]) -> int:
    """Do what the command line says. Raises UserError and UserErrors."""
    if argv and argv[0] in ("--shell-completion", "-sc") or argv[:1] and argv[0].startswith("--shell-completion="):
        return _complete(argv)
    if argv and argv[0] in ("report", "audit", "export") and not {"--help", "-h"} & set(argv):
        return _call(argv[0], argv[1:])
    command = parse(argv)
    if "help" in command.flags:
        from runner.cli.help import help_text

        print(help_text(VERBS))
        return 0
    if "version" in command.flags:
        from importlib.metadata import version

        print(version("runner"))
        return 0
    if "info" in command.flags:
        return _hydra_app(["--info", command.flags["info"] or "all", *command.overrides])
    if "cfg" in command.flags:
        return _show_config(command)
    return _start(command)


def parse(argv: list[str]) -> Command:
    """Split into verb, overrides, words and flags. Raises UserError for what is none of these."""
    command = Command("", [], [], {})
    items = iter(argv)
    for item in items:
        name, equals, value = item.partition("=")
        if name in FLAGS_WITH_VALUE:
            value = value if equals else next(items, "")
            if not value:
                raise UserError(f"{name} needs a value", fix="--cfg job, or --package model")
            command.flags[FLAGS_WITH_VALUE[name]] = value
        elif item in FLAGS:
            command.flags[FLAGS[item]] = ""
        elif item.startswith("-"):
            known = [*FLAGS, *FLAGS_WITH_VALUE]
            raise UserError(f"unknown flag {item}", fix=_did_you_mean(item, known, "python -m runner --help lists them"))
        elif equals or item.startswith("~"):
            command.overrides.append(item)
        elif not command.verb and item in VERBS:
            command.verb = item
        elif command.flags.get("info") == "" and item in ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"):
            command.flags["info"] = item
        elif command.verb and item in WORDS.get(command.verb, ()):
            command.words.append(item)
        else:
            raise UserError(f"{item!r} is neither a verb nor key=value", fix=_meant(item, command.verb))
    command.verb = command.verb or "run"
    return command


def _meant(word: str, verb: str) -> str:
    if verb:
        known = WORDS.get(verb, ())
        return f"one of {', '.join(known)}, or key=value" if known else f"python -m runner {verb} key=value ..."
    listed = f"the verbs are {', '.join(VERBS)}; everything else is key=value"
    return _did_you_mean(word, list(VERBS), listed)


def _did_you_mean(word: str, known: list[str], otherwise: str) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else otherwise


def _show_config(command: Command) -> int:
    from runner import compose

    if command.flags["cfg"] != "job":
        if command.flags["cfg"] not in ("hydra", "all"):
            raise UserError(f"--cfg {command.flags['cfg']}: no such part", fix="--cfg job, --cfg hydra or --cfg all")
        return _hydra_app(["--cfg", command.flags["cfg"], *(["--resolve"] * ("resolve" in command.flags)), *command.overrides])
    loaded = compose.load(command.overrides, check_rules=False)
    text = compose.to_yaml(loaded.raw, resolve="resolve" in command.flags, package=command.flags.get("package"))
    sys.stdout.write(text)
    return 0


def _start(command: Command) -> int:
    from runner import compose

    if command.verb == "convert":
        overrides = compose.with_prefix(command.overrides, "convert")
        return _call("convert", compose.load(overrides, check_rules=False).config, overrides)
    if command.verb == "run":
        swept = compose.sweep_overrides(command.overrides, multirun="multirun" in command.flags)
        if swept is not None:
            return _call("sweep", swept)
    elif "multirun" in command.flags:
        raise UserError(f"{command.verb} does not sweep", fix="python -m runner -m key=a,b,c runs a sweep")
    loaded = compose.load(command.overrides)
    if command.verb == "run":
        from runner import preflight, redaction

        preflight.check(loaded.config)  # before torch is imported: a machine that cannot run it hears so at once
        return _call("run", loaded.config, redaction.recorded(loaded.overrides))
    return _call(command.verb, loaded.config, *command.words)


def _call(verb: str, *arguments: Any) -> int:
    module, _, name = TARGETS[verb].partition(":")
    function: Callable[..., int] = getattr(importlib.import_module(module), name)
    return function(*arguments)


def _hydra_app(argv: list[str]) -> int:
    """Hand --info, --cfg hydra and shell completion to Hydra itself; it never gets as far as running a job."""
    import hydra

    from runner import compose
    from runner.searchpath import CONFIG_DIR

    compose.register()

    @hydra.main(config_path=str(CONFIG_DIR), config_name=compose.CONFIG_NAME, version_base=compose.VERSION_BASE)
    def application(cfg: Any) -> None:
        raise AssertionError("Hydra was asked to show something, not to run")

    sys.argv = [sys.argv[0], *argv]
    application()
    return 0


def _complete(argv: list[str]) -> int:
    """`eval "$(runner -sc install=bash)"`, and the queries of Tab. Verbs are ours, keys and options Hydra's."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if len(words) > 1 and words[1] in VERBS and (len(words) > 2 or line.endswith(" ")):
        os.environ["COMP_LINE"] = line.replace(f" {words[1]}", "", 1)
    elif line and "query=bash" in argv and len(words) <= 2:
        start = words[1] if len(words) == 2 else ""
        for verb in VERBS:
            if verb.startswith(start):
                print(verb)
    return _hydra_app(argv)


if __name__ == "__main__":
    sys.exit(main())
