"""What a verb is, and the one parser of every command line: `runner VERB [word ...] [key=value ...] [--flag ...]`.

argparse reads the flags and writes the help. What is no flag it hands back as typed, quotes and Unicode included: what a
`key=value` means is for Hydra and the schema (overrides.py). Torch-free.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runner import PROGRAM
from runner.errors import UserError

ANY = None  # of Verb.words


@dataclass(frozen=True)
class Command:
    """A parsed command line. `overrides`: keys of the config. `own`: the verb's own keys. `words`: neither of these."""

    verb: Verb
    overrides: list[str]
    own: dict[str, str]
    words: list[str]
    flags: argparse.Namespace


@dataclass(frozen=True)
class Verb:
    """One verb: what its help says, what it takes, and what it does. `examples`: (what follows the program's name, what for)."""

    name: str
    summary: str  # a line of `runner --help`
    usage: str  # what follows the verb
    about: str
    examples: tuple[tuple[str, str], ...]
    start: Callable[[Command], int]  # returns the exit code
    words: tuple[str, ...] | None = ()  # what may follow without a `=`; None: anything, such as folders
    own: Callable[[], Mapping[str, str]] = dict  # keys that only this verb has, and what they are
    group: str = ""  # own keys are keys of the config below this group, typed without it
    config: bool = True  # whether keys of the config may follow
    groups: bool = False  # whether the help lists the config's groups
    flags: Callable[[Parser], None] = lambda parser: None


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError instead of ending the process, and remembers what each of its flags is for."""

    def __init__(self, verb: Verb, usage: str, epilog: str = "") -> None:
        self.texts: dict[str, str] = {}
        super().__init__(
            usage=usage,
            description=verb.about,
            epilog=epilog,
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=128),
            add_help=False,
            allow_abbrev=False,
            exit_on_error=False,
        )
        self.flags = self.add_argument_group("flags")
        verb.flags(self)
        self.flag("--help", "-h", action="store_true", help="this text")
        self.flag("--version", action="store_true", help="the version of runner and its commit")

    def flag(self, *names: str, help: str, **settings: object) -> None:
        """Add a flag. Takes what argparse's add_argument takes."""
        self.texts |= dict.fromkeys(names, help)
        self.flags.add_argument(*names, help=help, **settings)  # type: ignore[arg-type]

    def read(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """(values of the flags, everything else in its order)."""
        try:
            return self.parse_known_args(argv)
        except argparse.ArgumentError as error:
            name = (error.argument_name or "").partition("/")[0]
            raise UserError(f"{name}: {error.message}", fix=f"{name} {self.texts.get(name, '')}") from None


def parse(verb: Verb, argv: list[str], others: Iterable[Verb] = ()) -> Command:
    """What follows `verb`. Raises UserError with a suggestion for what is none of its words, keys and flags.

    `others` are the verbs that an unknown flag or word may belong to.
    """
    parser = Parser(verb, usage="")
    flags, rest = parser.read(argv)
    own_keys = verb.own()
    command = Command(verb, [], {}, [], flags)
    for item in rest:
        key, equals, value = item.partition("=")
        if item.startswith("-") and not item[1:].isdecimal():
            raise _unknown_flag(item, verb, parser, others)
        if verb.config and (equals or item.startswith("~")) and not (verb.words is ANY and _is_folder(item)):
            if key not in own_keys:
                command.overrides.append(item)
            elif verb.group:
                command.overrides.append(f"{verb.group}.{item}")
            else:
                command.own[key] = value
        elif verb.words is ANY or (item in verb.words and not command.words):
            command.words.append(item)
        else:
            raise _unknown_word(item, verb, others)
    return command


def _is_folder(text: str) -> bool:
    return Path(text).expanduser().is_dir()  # a sweep's jobs lie in folders that are named key=value


def _unknown_flag(flag: str, verb: Verb, parser: Parser, others: Iterable[Verb]) -> UserError:
    name, equals, _ = flag.partition("=")
    for other in others:
        text = Parser(other, usage="").texts.get(name)
        if text:
            return UserError(f"{verb.name} has no flag {name}", fix=f"{PROGRAM} {other.name} {name}: {text}")
    close = difflib.get_close_matches(name, parser.texts, n=1, cutoff=0.8 if equals else 0.6)
    if close:
        fix = f"did you mean {close[0]}?"
    elif equals and verb.config:
        fix = f"keys have no dashes: {flag.lstrip('-')}"
    else:
        fix = f"{PROGRAM} {verb.name} --help lists what it takes"
    return UserError(f"unknown flag {flag}", fix=fix)


def _unknown_word(word: str, verb: Verb, others: Iterable[Verb]) -> UserError:
    allowed = verb.words or ()
    close = difflib.get_close_matches(word, allowed, n=1)
    if allowed:
        fix = (f"did you mean {close[0]}? " if close else "") + f"{verb.name} takes one of: {', '.join(allowed)}"
    elif word in (other.name for other in others):
        fix = f"the verb comes first: {PROGRAM} {word} ..."
    else:
        fix = f"{PROGRAM} {verb.name} {verb.usage}"
    return UserError(f"{word!r} is no word of `{verb.name}`, and not key=value", fix=fix)


def help_of(verb: Verb, groups: Callable[[], str]) -> str:
    """The text of `runner VERB --help`: what it does and takes, its own keys, and commands to copy."""
    parts = []
    own = verb.own()
    if own:
        parts.append("\n".join(["keys", *columns([(f"{key}=", text) for key, text in own.items()])]))
    if verb.groups:
        parts.append(groups())
    elif verb.config:
        parts.append(f"Any key of the config may follow, too: `{PROGRAM} run --help` lists its groups.")
    parts.append("\n".join(["examples", *examples(verb.examples)]))
    parser = Parser(verb, usage=f"{PROGRAM} {verb.name} {verb.usage}", epilog="\n\n".join(parts))
    return parser.format_help().rstrip()


def examples(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Commands to copy with what they are for, a line each."""
    return columns([(f"{PROGRAM} {line}".rstrip(), f"# {text}") for line, text in rows])


def columns(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of two aligned columns."""
    rows = list(rows)
    width = max(len(left) for left, _ in rows)
    return [f"  {left:<{width}}  {right}".rstrip() for left, right in rows]
